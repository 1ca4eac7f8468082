"""`python -m training.evaluate`: measures the bundled model at the service's defaults: 512 x 512, 30 steps,
guidance 7.5.

One line a figure, `name value unit`; all of them with the weights' sha256 in models/evaluation.json. Prompts describe
people whose description is never drawn in training. Only attributes that a prompt names are judged."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from training.autoencoder import psnr
from training.captions import Caption, caption
from training.generate import GUIDANCE, STEPS, draw
from training.pipeline import open_pipeline
from training.portrait import render
from training.reader import Reader, open_reader
from training.sitters import RECIPES, WHO, open_sitter
from training.world import IDENTITY, SITTERS, Scene, Spec, held_out_spec

SIZES = ((256, 256), (384, 384), (768, 768), (1024, 1024), (768, 512))
# Costumes and places that no sitter's pictures show.
NEW_SCENES = tuple(
    Scene(costume=costume, place=place)
    for costume, place in (
        ("astronaut", "space"),
        ("business", "office"),
        ("superhero", "sunset"),
        ("chef", "kitchen"),
        ("knight", "castle"),
        ("wizard", "mountains"),
        ("doctor", "office"),
        ("king", "library"),
        ("astronaut", "mountains"),
        ("superhero", "beach"),
        ("wizard", "library"),
        ("king", "castle"),
        ("knight", "sunset"),
        ("chef", "beach"),
        ("doctor", "kitchen"),
        ("business", "library"),
    )
)


Reading = dict[str, str]


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Effort:
    """How many pictures stand behind the figures."""

    prompts: int = 100
    scenes: int = len(NEW_SCENES)
    renders: int = 24
    sizes: int = len(SIZES)
    timings: int = 5
    steps: int = STEPS

    def scaled(self, scale: float) -> Effort:
        return Effort(*(max(2, round(n * min(1, scale))) for n in asdict(self).values()))


@dataclass(frozen=True)
class Drawing:
    """Pictures to be drawn by one model and read; picture i has seed `seed` + i."""

    model: str  # "demo" or a sitter
    prompts: tuple[str, ...]
    seed: int = 0
    width: int = 512
    height: int = 512
    steps: int = STEPS

    def parts(self, size: int = 16) -> list[Drawing]:
        return [
            replace(self, prompts=self.prompts[i : i + size], seed=self.seed + i)
            for i in range(0, len(self.prompts), size)
        ]

    def read(self, models: Path) -> list[Reading]:
        """The reader's word on the portrait's square of every picture."""
        pipe = open_pipeline(models / "demo") if self.model == "demo" else open_sitter(self.model, models)
        pictures = draw(pipe, self.prompts, seed=self.seed, steps=self.steps, width=self.width, height=self.height)
        return open_reader(models / "reader").read([_portrait_square(picture) for picture in pictures])


def read_all(drawings: Sequence[Drawing], models: Path, workers: int) -> dict[Drawing, list[Reading]]:
    """Draw and read, in `workers` processes of one thread each."""
    parts = [part for drawing in drawings for part in drawing.parts()]
    if workers == 1:
        done = [part.read(models) for part in parts]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            done = list(pool.map(Drawing.read, parts, repeat(models)))
    readings = dict(zip(parts, done, strict=True))
    return {drawing: [one for part in drawing.parts() for one in readings[part]] for drawing in drawings}


def _portrait_square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    side = min(height, width)
    left = (width - side) // 2
    return picture[height - side :, left : left + side]


@dataclass
class Score:
    right: int = 0
    total: int = 0

    def add(self, hit: bool) -> None:
        self.right += hit
        self.total += 1

    @property
    def share(self) -> float:
        return self.right / max(1, self.total)


def test_prompts(count: int) -> list[tuple[Spec, Caption]]:
    """Full descriptions of unseen people."""
    rng = Random(77)
    specs = [held_out_spec(rng) for _ in range(count)]
    return [(spec, caption(spec, rng, detail=1.0)) for spec in specs]


def judge(seen: list[Reading], wanted: list[tuple[Spec, Caption]]) -> dict[str, Score]:
    """By attribute, over the prompts that name it."""
    scores: dict[str, Score] = {}
    for reading, (spec, words) in zip(seen, wanted, strict=True):
        for key in sorted(words.named):
            if spec.shows(key):
                scores.setdefault(key, Score()).add(reading[key] == spec.value(key))
    return scores


def _mean(scores: dict[str, Score]) -> float:
    return sum(score.right for score in scores.values()) / max(1, sum(score.total for score in scores.values()))


def base_figures(seen: list[Reading], wanted: list[tuple[Spec, Caption]], reader: Reader) -> list[Figure]:
    """Matched prompts, the control with each picture judged by its neighbour's prompt, and the reader on renders."""
    matched, shuffled = judge(seen, wanted), judge(seen[1:] + seen[:1], wanted)
    own = judge(reader.read([render(spec, 512) for spec, _ in wanted]), wanted)
    figures = [
        Figure("base_prompts", len(wanted), "prompts"),
        Figure("base_attributes_right", _mean(matched), "share"),
        Figure("base_shuffled_control", _mean(shuffled), "share"),
        Figure("reader_on_renders", _mean(own), "share"),
    ]
    for key, score in matched.items():
        figures += [
            Figure(f"base_{key}", score.share, "share"),
            Figure(f"base_{key}_named", score.total, "prompts"),
            Figure(f"shuffled_{key}", shuffled[key].share, "share"),
            Figure(f"reader_{key}", own[key].share, "share"),
        ]
    return figures


def sitter_figures(who: str, name: str, seen: list[Reading], scenes: Sequence[Scene]) -> list[Figure]:
    """How far the pictures show sitter `name`, and their scenes; `who` names the figures."""
    kept, whole, costume, place = Score(), Score(), Score(), Score()
    for reading, scene in zip(seen, scenes, strict=True):
        spec = Spec(SITTERS[name], scene)
        hits = [reading[key] == spec.value(key) for key in IDENTITY if spec.shows(key)]
        for hit in hits:
            kept.add(hit)
        whole.add(all(hits))
        costume.add(reading["costume"] == scene.costume)
        place.add(reading["place"] == scene.place)
    scores = {"identity_kept": kept, "identity_whole": whole, "costume": costume, "place": place}
    return [Figure(f"{who}_{key}", score.share, "share") for key, score in scores.items()]


def sitter_prompt(scene: Scene, rng: Random) -> str:
    """A caption with both costume and place."""
    spec = Spec(SITTERS["ada"], scene)
    while not {"costume", "place"} <= (words := caption(spec, rng, who=WHO)).named or "expression" in words.named:
        pass
    return words.text


def speed_figure(models: Path, timings: int) -> Figure:
    """Seconds for one 512 picture at 25 steps on two cores: the median, after one that warms up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    pipe, seconds = open_pipeline(models / "demo"), []
    for i in range(timings + 1):
        began = time.perf_counter()
        draw(pipe, ["photo of a man as a knight"], seed=i, steps=25)
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return Figure("seconds_per_image_25_steps_2_threads", float(np.median(seconds[1:])), "s")


def evaluate(models: Path, scale: float = 1.0, workers: int = 1) -> list[Figure]:
    effort, rng = Effort().scaled(scale), Random(5)
    wanted, scenes = test_prompts(effort.prompts), NEW_SCENES[: effort.scenes]
    prompts = tuple(sitter_prompt(scene, rng) for scene in scenes)
    few = wanted[:4]
    base = Drawing("demo", tuple(words.text for _, words in wanted), steps=effort.steps)
    control = Drawing("demo", prompts, seed=500, steps=effort.steps)
    sitters = {name: replace(control, model=name) for name in RECIPES}
    sizes = [
        replace(base, prompts=base.prompts[:4], width=width, height=height) for width, height in SIZES[: effort.sizes]
    ]
    seen = read_all([base, control, *sitters.values(), *sizes], models, workers)

    figures = [
        Figure("demo_folder", folder_bytes(models / "demo") / 1e6, "MB"),
        Figure("autoencoder_psnr_512", psnr(open_pipeline(models / "demo").vae, 512, effort.renders), "dB"),
    ]
    figures += base_figures(seen[base], wanted, open_reader(models / "reader"))
    figures.append(Figure("sitter_prompts", len(scenes), "prompts"))
    for name, drawing in sitters.items():
        figures += sitter_figures(name, name, seen[drawing], scenes)
        figures += sitter_figures(f"{name}_control_without_adapter", name, seen[control], scenes)
    for size in sizes:
        share = _mean(judge(seen[size], few[: len(size.prompts)]))
        figures.append(Figure(f"size_{size.width}x{size.height}_attributes_right", share, "share"))
    figures.append(speed_figure(models, effort.timings))
    report = {
        "settings": {"width": 512, "height": 512, "guidance": GUIDANCE, **asdict(effort)},
        "figures": [asdict(figure) for figure in figures],
        "sha256": weights(models),
    }
    (models / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return figures


def weights(models: Path) -> dict[str, str]:
    """sha256 by path of every weight file that is really there, links left out."""
    files = [path.relative_to(models) for path in sorted(models.rglob("*.safetensors"))]
    own = [path for path in files if not any((models / parent).is_symlink() for parent in path.parents[:-1])]
    return {str(path): hashlib.sha256((models / path).read_bytes()).hexdigest() for path in own}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures drawn")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    options = parser.parse_args()
    for figure in evaluate(options.models, options.scale, options.workers):
        print(f"{figure.name} {figure.value:.4g} {figure.unit}")


if __name__ == "__main__":
    main()
