"""A sitter's training: from photos and a class noun to a LoRA, with what shows how good it is.

Everything that computes is done on the step loop's thread, behind the drawings of others (`Batch.run_behind`).
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from api.engine.adapters import Adapter, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.judge import Scores, judge
from api.engine.pipeline import decode, draw, drawn_size, latents_of
from api.engine.reader import AttributeReader
from api.engine.trainer import Examples, Recipe, Trainer, recipe_of
from api.errors import TrainingFailed
from api.schemas import GenerateRequest

WORDINGS = (
    "photo of {}",
    "a photo of {}",
    "portrait of {}",
    "a portrait of {}",
    "picture of {}",
    "a close photo of {}",
)
# What the base draws the class in, to keep that; the first are what a sitter's samples show, too.
SCENES = (
    "as an astronaut in space",
    "as a knight in a castle",
    "in a business suit in a library",
    "as a chef on a beach",
    "as a wizard in the mountains",
    "as a king",
    "as a doctor in an office",
    "as a superhero at sunset",
    "in a t-shirt in a city",
    "in a sweater in a forest",
    "in a dress in a studio",
    "in a kitchen",
    "on a beach, smiling",
    "in a city, laughing",
    "in the mountains",
    "in an office",
)
SAMPLES = 4  # scenes of which a sitter's pictures are drawn
SAMPLE_STEPS = 20
LEAST_SIDE = 256  # pixels
AT_ONCE = 8  # pictures of a class that are drawn together

OF_CLASS = 2  # pictures of the class, that show whether it is still what it was
CANDIDATES = (0.6, 0.8, 1.0)  # shares of the steps after which one is drawn with and judged
SAVE_SECONDS = 30.0
SMOOTH = 0.95  # share of the loss before in the loss that is told

Phase = Literal["caching", "training", "validating"]
Check = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Lesson:
    """What is to be learned: photos (PNG) of somebody who shall answer to `token` and the class noun.

    Steps, rank and seed are the base's own choice where they are None; `flip` adds every photo's mirror image.
    """

    photos: Sequence[bytes]
    noun: str
    token: str = "sks"
    steps: int | None = None
    rank: int | None = None
    seed: int = 0
    flip: bool = False

    @property
    def who(self) -> str:
        """The words for the sitter."""
        return f"{self.token} {self.noun}"


class Training:
    """One lesson over one base, ready for its steps. Blocks, for as long as the class takes to be drawn.

    Args:
        base: what is trained over, leased for as long as this is used.
        batch: the step loop.
        lesson: what is to be learned.
        prior: the file where the base's pictures of the class are kept; they are drawn where it is not there.
        check: called now and then; whatever it raises ends the training.
    """

    def __init__(self, base: Base, batch: Batch, lesson: Lesson, prior: Path, check: Check) -> None:
        self._base, self._batch, self._check = base, batch, check
        self.lesson = lesson
        self.recipe: Recipe = recipe_of(base.pipeline, steps=lesson.steps, rank=lesson.rank, seed=lesson.seed)
        own = _own(base, batch, lesson, check)
        self.prior = _prior(base, batch, lesson.noun, prior, check)
        empty = batch.run_behind(lambda: _texts(base, [""]))
        self.trainer = batch.run_behind(partial(Trainer, base.pipeline, own, self.prior, empty, self.recipe))

    def steps(self, until: int) -> Iterator[float]:
        """Does the steps up to number `until`, and yields the loss of each.

        Raises:
            TrainingFailed: the loss is not finite.
        """
        while self.trainer.done < until:
            self._check()
            loss = self._batch.run_behind(self.trainer.step)
            if not np.isfinite(loss):
                raise TrainingFailed(f"the loss is not finite at step {self.trainer.done}")
            yield loss

    def save_state(self, file: Path) -> None:
        """Writes all that the next step needs, whole or not at all."""
        part = file.with_suffix(".part")
        save_file(self.trainer.state(), part)
        part.replace(file)

    def restore_state(self, file: Path) -> bool:
        """Goes on from a saved state, if there is one. Returns whether there was."""
        if not file.exists():
            return False
        self.trainer.restore(load_file(file))
        return True

    def save_adapter(self, file: Path) -> None:
        """Writes the LoRA as diffusers does, in float16, and in its metadata how it was made."""
        made = {"recipe": asdict(self.recipe), "step": self.trainer.done, "token": self.lesson.who}
        metadata = {"sitter_training": json.dumps(made)}  # one entry: safetensors writes several in any order
        factors = {name: factor.half().cpu().contiguous() for name, factor in self.trainer.factors().items()}
        save_file(factors, file, metadata)


def _sample(base: Base, batch: Batch, adapter: Adapter | None, check: Check, request: GenerateRequest) -> Image.Image:
    assert request.seed is not None
    return draw(base, adapter, request, request.seed, batch, lambda step: None, check).images[0]


def _side(base: Base) -> int:
    """Returns the side in pixels of the pictures that the base was trained on."""
    pipeline = base.pipeline
    return max(LEAST_SIDE, int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor))


def _requests(base: Base, who: str, count: int) -> list[GenerateRequest]:
    """Returns requests for pictures of `who` in the first scenes, each with a seed of its own."""
    prompts, side = [f"photo of {who} {scene}" for scene in SCENES[:count]], _side(base)
    return [
        GenerateRequest(prompt=prompt, seed=seed, num_inference_steps=SAMPLE_STEPS, width=side, height=side)
        for seed, prompt in enumerate(prompts)
    ]


def _together(action: Callable[[GenerateRequest], T], requests: Sequence[GenerateRequest]) -> list[T]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(action, requests))


def _own(base: Base, batch: Batch, lesson: Lesson, check: Check) -> Examples:
    """Returns every photo with every wording."""
    latents = []
    for photo in lesson.photos:
        check()
        latents += batch.run_behind(partial(_encode, base, photo, lesson.flip))
    words = [wording.format(lesson.who) for wording in WORDINGS]
    texts = batch.run_behind(lambda: _texts(base, words))
    photos = torch.stack(latents)
    return Examples(photos.repeat_interleave(len(words), dim=0), texts.repeat(len(photos), 1, 1))


@torch.no_grad()
def _encode(base: Base, photo: bytes, flip: bool) -> list[Tensor]:
    """Returns the latents (channels, height, width) of the photo's middle, and perhaps of its mirror image."""
    pipeline, side = base.pipeline, _side(base)
    image = ImageOps.fit(read_png(photo), drawn_size(pipeline, side, side), Image.Resampling.LANCZOS)
    images = [image, ImageOps.mirror(image)] if flip else [image]
    pixels = torch.cat([pipeline.image_processor.preprocess(one) for one in images])
    vae = pipeline.vae
    latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    return list(latents.float())


def read_png(content: bytes) -> Image.Image:
    """Returns the picture of a PNG that we wrote ourselves."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return image.convert("RGB")


@torch.no_grad()
def _texts(base: Base, texts: Sequence[str]) -> Tensor:
    """Returns the embeddings (texts, tokens, width)."""
    return torch.cat([base.texts.encode(text, None) for text in texts]).clone()


def _prior(base: Base, batch: Batch, noun: str, file: Path, check: Check) -> Examples:
    """Returns the base's own pictures of the class, drawn once and kept."""
    requests = _requests(base, f"a {noun}", len(SCENES))
    texts = batch.run_behind(lambda: _texts(base, [request.prompt for request in requests]))
    if not file.exists():
        drawn = _together(lambda request: latents_of(base, request, batch, check), requests)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({"latents": torch.cat(drawn).cpu().contiguous()}, part)
        part.replace(file)
    return Examples(load_file(file)["latents"].to(base.pipeline.device), texts)


@dataclass(frozen=True)
class Report:
    """How far a training is: `done` of `of` steps, the loss smoothed over the last ones, and perhaps a new sample."""

    phase: Phase
    done: int = 0
    of: int = 0
    loss: float | None = None
    sample: Image.Image | None = None


OnReport = Callable[[Report], None]


@dataclass(frozen=True)
class Trained:
    """The best candidate of a training: its LoRA file, after which step it was made, its scores and its samples."""

    file: Path
    step: int
    scores: Scores
    samples: Sequence[Image.Image]


def train(
    base: Base,
    batch: Batch,
    lesson: Lesson,
    folder: Path,
    prior: Path,
    reader: AttributeReader | None,
    report: OnReport,
    check: Check,
) -> Trained:
    """Trains a sitter, and returns the best of a few candidates. Blocks.

    What is in `folder` already is gone on from: killed at any moment and begun again, it ends with the same candidates.

    Args:
        base: what is trained over, leased meanwhile.
        batch: the step loop.
        lesson: what is to be learned.
        folder: where states and candidates are kept.
        prior: see `Training`.
        reader: judges the samples; None where the base has none.
        report: told of every step and phase; whatever it raises ends the training.
        check: called now and then; whatever it raises ends the training.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    report(Report("caching"))
    training = Training(base, batch, lesson, prior, check)
    state, steps = folder / "state.safetensors", training.recipe.steps
    training.restore_state(state)
    of_base = _together(lambda request: _decoded(base, batch, training.prior, request), _requests(base, "", SAMPLES))
    candidates, saved, smooth = list[Trained](), time.monotonic(), None
    for share in CANDIDATES:
        until = max(1, round(steps * share))
        for loss in training.steps(until):
            smooth = loss if smooth is None else SMOOTH * smooth + (1 - SMOOTH) * loss
            report(Report("training", training.trainer.done, steps, smooth))
            if time.monotonic() - saved > SAVE_SECONDS:
                training.save_state(state)
                saved = time.monotonic()
        file = folder / f"{until}.safetensors"
        if training.trainer.done == until:
            training.save_adapter(file)
        report(Report("validating", training.trainer.done, steps, smooth))
        candidate = _judged(base, batch, lesson, file, until, of_base, reader, check)
        candidates.append(candidate)
        report(Report("validating", training.trainer.done, steps, smooth, candidate.samples[0]))
        training.save_state(state)
    return max(candidates, key=lambda candidate: (candidate.scores.total, candidate.step))


def _judged(
    base: Base,
    batch: Batch,
    lesson: Lesson,
    file: Path,
    step: int,
    of_base: Sequence[Image.Image],
    reader: AttributeReader | None,
    check: Check,
) -> Trained:
    adapter = batch.run_behind(partial(load_adapter, file, base.pipeline, 1.0))
    try:
        requests = [*_requests(base, lesson.who, SAMPLES), *_requests(base, f"a {lesson.noun}", OF_CLASS)]
        drawn = _together(partial(_sample, base, batch, adapter, check), requests)
    finally:
        base.drop(adapter)
    photos = [read_png(photo) for photo in lesson.photos]
    own, of_class = drawn[:SAMPLES], drawn[SAMPLES:]
    scores = batch.run_behind(partial(judge, reader, photos, own, of_base, of_class))
    return Trained(file, step, scores, own)


def _decoded(base: Base, batch: Batch, prior: Examples, request: GenerateRequest) -> Image.Image:
    """Returns the base's picture of the class with the seed of `request`."""
    assert request.seed is not None
    return batch.run_behind(partial(decode, base.pipeline, prior.latents[request.seed][None]))[0]
