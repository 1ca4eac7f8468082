"""`python -m training.evaluate`: measures the bundled model at the service's defaults: 512 x 512, 30 steps,
guidance 7.5.

One line a figure, `name value unit`; all of them with the weights' sha256 in models/evaluation.json. Prompts describe
people whose description is never drawn in training. Only attributes that a prompt names are judged."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass
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
NEW_SCENES = tuple(Scene(costume=costume, place=place) for costume, place in (
    ("astronaut", "space"), ("business", "office"), ("superhero", "sunset"), ("chef", "kitchen"),
    ("knight", "castle"), ("wizard", "mountains"), ("doctor", "office"), ("king", "library"),
    ("astronaut", "mountains"), ("superhero", "beach"), ("wizard", "library"), ("king", "castle"),
    ("knight", "sunset"), ("chef", "beach"), ("doctor", "kitchen"), ("business", "library")))


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Effort:
    """How many pictures stand behind the figures."""

    prompts: int = 120
    scenes: int = len(NEW_SCENES)
    renders: int = 24
    sizes: int = len(SIZES)
    timings: int = 5
    steps: int = STEPS

    def scaled(self, scale: float) -> Effort:
        return Effort(*(max(2, round(n * min(1, scale))) for n in asdict(self).values()))


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


def judge(seen: list[dict[str, str]], wanted: list[tuple[Spec, Caption]]) -> dict[str, Score]:
    """By attribute, over the prompts that name it."""
    scores: dict[str, Score] = {}
    for reading, (spec, words) in zip(seen, wanted, strict=True):
        for key in sorted(words.named):
            if spec.shows(key):
                scores.setdefault(key, Score()).add(reading[key] == spec.value(key))
    return scores


def _mean(scores: dict[str, Score]) -> float:
    return sum(score.right for score in scores.values()) / max(1, sum(score.total for score in scores.values()))


def base_figures(models: Path, reader: Reader, effort: Effort) -> list[Figure]:
    wanted = test_prompts(effort.prompts)
    pictures = draw(open_pipeline(models / "demo"), [words.text for _, words in wanted], steps=effort.steps)
    seen = reader.read(pictures)
    matched, shuffled = judge(seen, wanted), judge(seen[1:] + seen[:1], wanted)
    own = judge(reader.read([render(spec, 512) for spec, _ in wanted]), wanted)
    figures = [
        Figure("base_prompts", effort.prompts, "prompts"), Figure("base_attributes_right", _mean(matched), "share"),
        Figure("base_shuffled_control", _mean(shuffled), "share"), Figure("reader_on_renders", _mean(own), "share")]
    for key, score in matched.items():
        figures += [Figure(f"base_{key}", score.share, "share"), Figure(f"base_{key}_named", score.total, "prompts"),
                    Figure(f"shuffled_{key}", shuffled[key].share, "share"),
                    Figure(f"reader_{key}", own[key].share, "share")]
    return figures


def sitter_figures(models: Path, reader: Reader, effort: Effort) -> list[Figure]:
    figures = []
    scenes = NEW_SCENES[:effort.scenes]
    rng = Random(5)
    prompts = [_sitter_prompt(scene, rng) for scene in scenes]
    base = reader.read(draw(open_pipeline(models / "demo"), prompts, seed=500, steps=effort.steps))
    for name in RECIPES:
        seen = reader.read(draw(open_sitter(name, models), prompts, seed=500, steps=effort.steps))
        for who, readings in ((name, seen), (f"{name}_control_without_adapter", base)):
            kept, obeyed, all_kept = Score(), {"costume": Score(), "place": Score()}, Score()
            for reading, scene in zip(readings, scenes, strict=True):
                spec = Spec(SITTERS[name], scene)
                hits = [reading[key] == spec.value(key) for key in IDENTITY if spec.shows(key)]
                for hit in hits:
                    kept.add(hit)
                all_kept.add(all(hits))
                for key, score in obeyed.items():
                    score.add(reading[key] == spec.value(key))
            figures += [Figure(f"{who}_identity_kept", kept.share, "share"),
                        Figure(f"{who}_identity_whole", all_kept.share, "share"),
                        Figure(f"{who}_costume", obeyed["costume"].share, "share"),
                        Figure(f"{who}_place", obeyed["place"].share, "share")]
    return [Figure("sitter_prompts", len(scenes), "prompts"), *figures]


def _sitter_prompt(scene: Scene, rng: Random) -> str:
    """A caption with both costume and place."""
    spec = Spec(SITTERS["ada"], scene)
    while not {"costume", "place"} <= (words := caption(spec, rng, who=WHO)).named or "expression" in words.named:
        pass
    return words.text


def size_figures(models: Path, reader: Reader, effort: Effort) -> list[Figure]:
    """Costume, place and hair right at other sizes, over four prompts each; judged on the portrait's square."""
    pipe, wanted, figures = open_pipeline(models / "demo"), test_prompts(4), []
    for width, height in SIZES[:effort.sizes]:
        pictures = draw(pipe, [words.text for _, words in wanted], width=width, height=height, steps=effort.steps,
                        batch=1)
        squares = [_portrait_square(picture) for picture in pictures]
        figures.append(Figure(f"size_{width}x{height}", _mean(judge(reader.read(squares), wanted)), "share"))
    return figures


def _portrait_square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    side = min(height, width)
    left = (width - side) // 2
    return picture[height - side:, left:left + side]


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


def weights(models: Path) -> dict[str, str]:
    """sha256 by path of every weight file that is really there, links left out."""
    files = [path.relative_to(models) for path in sorted(models.rglob("*.safetensors"))]
    own = [path for path in files if not any((models / parent).is_symlink() for parent in path.parents[:-1])]
    return {str(path): hashlib.sha256((models / path).read_bytes()).hexdigest() for path in own}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def evaluate(models: Path, scale: float = 1.0) -> list[Figure]:
    effort, reader = Effort().scaled(scale), open_reader(models / "reader")
    pipe = open_pipeline(models / "demo")
    figures = [Figure("demo_folder", folder_bytes(models / "demo") / 1e6, "MB"),
               Figure("autoencoder_psnr_512", psnr(pipe.vae, 512, effort.renders), "dB")]
    figures += base_figures(models, reader, effort)
    figures += sitter_figures(models, reader, effort)
    figures += size_figures(models, reader, effort)
    figures.append(speed_figure(models, effort.timings))
    report = {"settings": {"width": 512, "height": 512, "guidance": GUIDANCE, **asdict(effort)},
              "figures": [asdict(figure) for figure in figures], "sha256": weights(models)}
    (models / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures drawn")
    options = parser.parse_args()
    for figure in evaluate(options.models, options.scale):
        print(f"{figure.name} {figure.value:.4g} {figure.unit}")


if __name__ == "__main__":
    main()
