"""A sitter's training: from photos and a class noun to a LoRA or a whole model, with what shows how good it is.

Everything that computes is done on the step loop's thread, behind the drawings of others (`Batch.run_behind`); but what
a base of the stock lane draws, see `samples`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import structlog
from PIL import Image
from torch import Tensor

from api.engine.base import Base
from api.engine.candidates import Ground, discard, save_model
from api.engine.examples import Check, kept, learned_side, of_photos, resized, side_of, square
from api.engine.judge import Judge, Scores, Shown, T, judge
from api.engine.lesson import Lesson
from api.engine.pipeline import decode
from api.engine.samples import by_candidate, of_class
from api.engine.stock import StockBase
from api.engine.threads import in_own_thread
from api.engine.trainer import Examples, Recipe, Trainer, recipe_of
from api.engine.weights import load_noted, save_whole
from api.errors import BadPicture, Blocked, TrainingFailed
from api.schemas import GenerateRequest

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
OF_CLASS = 2  # pictures of the class, that show whether it is still what it was
CANDIDATES = (0.6, 0.8, 1.0)  # shares of the steps after which one is drawn with and judged
SAVE_SHARE = 0.05  # of the time, that goes into saving states
SMOOTH = 0.95  # share of the loss before in the loss that is told

log = structlog.get_logger()
Phase = Literal["caching", "training", "validating"]
OpenJudge = Callable[[], Judge | None]


class Training:
    """One lesson over one base, ready for its steps. Blocks, for as long as the class takes to be drawn.

    Args:
        ground: what is trained over, leased for as long as this is used.
        lesson: what is to be learned.
        priors: the folder where bases' pictures of classes are kept; they are drawn where they are not there.
        check: called now and then; whatever it raises ends the training.
    """

    def __init__(self, ground: Ground, lesson: Lesson, priors: Path, check: Check) -> None:
        self._ground, self._base, self._batch, self._check = ground, ground.base, ground.batch, check
        self.lesson, pipeline = lesson, ground.base.pipeline
        self._side = learned_side(pipeline, lesson.resolution)
        self.recipe: Recipe = recipe_of(
            pipeline,
            full=lesson.kind == "full",
            steps=lesson.steps,
            rank=lesson.rank,
            seed=lesson.seed,
            text_rate=None if lesson.train_text_encoder else 0.0,
            prior=None if lesson.prior_preservation else 0,
            resolution=self._side,
        )
        own = of_photos(pipeline, self._batch, lesson, self._side, check)
        self.of_class, prior = self._of_class(priors)
        self.trainer = in_own_thread(partial(Trainer, pipeline, own, prior, self.recipe))

    def _of_class(self, folder: Path) -> tuple[Tensor, Examples | None]:
        """Returns the base's own pictures of the class as latents, and what of them is learned, drawn once and kept."""
        pipeline, learned = self._base.pipeline, self.recipe.prior > 0
        scenes = len(SCENES) if learned else SAMPLES  # the first show what is judged
        requests = _requests(self._base, f"a {self.lesson.noun}", scenes)
        asked = [self._ground.mark, *(request.model_dump() for request in requests)]
        draw = partial(of_class, self._base, self._batch, requests, self._check)
        drawn = kept(_file(folder, asked), draw).to(pipeline.device)
        if not learned:
            return drawn, None
        latents = drawn
        if self._side != learned_side(pipeline, None):  # as with photos: of a whole picture, made smaller
            make = partial(resized, pipeline, self._batch, drawn, self._side, self._check)
            latents = kept(_file(folder, [*asked, self._side]), make).to(pipeline.device)
        return drawn, Examples(latents, [request.prompt for request in requests])

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

    @property
    def _note(self) -> str:
        """Tells this lesson from every other."""
        photos = [hashlib.sha256(photo).hexdigest() for photo in self.lesson.photos]
        return json.dumps([self.lesson.kind, asdict(self.recipe), self.lesson.who, self.lesson.flip, photos])

    def save_state(self, file: Path) -> None:
        """Writes all that the next step needs, whole or not at all."""
        save_whole(self._batch.run_behind(self.trainer.state), file, self._note)

    def restore_state(self, file: Path) -> None:
        """Goes on from the saved state of this very lesson, if there is one."""
        if (state := load_noted(file, self._note)) is not None:
            self._batch.run_behind(partial(self.trainer.restore, state))

    def candidate(self, folder: Path, step: int) -> Path:
        """Returns where in `folder` the candidate of a step is, or would be."""
        return folder / (f"{step}.safetensors" if self.lesson.kind == "lora" else str(step))

    def save_candidate(self, path: Path) -> None:
        """Writes a LoRA as diffusers does, and in its metadata how it was made; or the folder of a whole model."""
        tensors = self._batch.run_behind(self.trainer.learned.tensors)
        if self.lesson.kind == "full":
            save_model(self._ground.found, tensors, path)
            return
        made = {"recipe": asdict(self.recipe), "step": self.trainer.done, "token": self.lesson.who}
        save_whole(tensors, path, json.dumps(made))


def _requests(base: Base | StockBase, who: str, count: int) -> list[GenerateRequest]:
    """Returns requests for pictures of `who` in the first scenes, each with a seed of its own."""
    prompts, side = [f"photo of {who} {scene}" for scene in SCENES[:count]], side_of(base.pipeline)
    return [
        GenerateRequest(prompt=prompt, seed=seed, num_inference_steps=SAMPLE_STEPS, width=side, height=side)
        for seed, prompt in enumerate(prompts)
    ]


def _file(folder: Path, asked: object) -> Path:
    """Returns where that is kept which was made of what is `asked`."""
    return folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.safetensors"


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
    """The best candidate of a training: after which step it was made, its scores and its samples.

    `file` is a LoRA's, or the folder of a whole model; `base_hash` tells the base that it was trained over.
    """

    file: Path
    step: int
    scores: Scores
    samples: Sequence[Image.Image]
    recipe: Recipe
    base_hash: str


class _Saving:
    """When the next state is to be saved: the longer that takes, the less often."""

    def __init__(self) -> None:
        self._next = 0.0  # at once: who is begun again and again shall come farther each time

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def took(self, save: Callable[[], None]) -> None:
        began = time.monotonic()
        save()
        now = time.monotonic()
        self._next = now + (now - began) / SAVE_SHARE


def train(
    ground: Ground,
    lesson: Lesson,
    folder: Path,
    priors: Path,
    open_judge: OpenJudge,
    report: OnReport,
    check: Check,
) -> Trained:
    """Trains a sitter, and returns the best of a few candidates. Blocks.

    What is in `folder` already is gone on from: killed at any moment and begun again, it ends with the same candidate.

    Args:
        ground: what is trained over.
        lesson: what is to be learned.
        folder: where a state and the best candidate so far are kept.
        priors: see `Training`.
        open_judge: loads what measures the samples, or returns None where nothing can; dropped after each use.
        report: told of every step and phase; whatever it raises ends the training.
        check: called now and then; whatever it raises ends the training.

    Raises:
        InvalidRequest: the base cannot learn at that resolution.
        TrainingFailed: the loss is not finite.
    """
    open_judge()  # told now, and not in minutes, if it does not load
    report(Report("caching"))
    training = Training(ground, lesson, priors, check)
    state, steps = folder / "state.safetensors", training.recipe.steps
    training.restore_state(state)
    of_base = [_decoded(ground, latents) for latents in training.of_class[:SAMPLES]]
    best: Trained | None = None
    saving, smooth = _Saving(), None
    for until in sorted({max(1, round(steps * share)) for share in CANDIDATES}):
        try:
            for loss in training.steps(until):
                smooth = loss if smooth is None else SMOOTH * smooth + (1 - SMOOTH) * loss
                report(Report("training", training.trainer.done, steps, smooth))
                if saving.is_due():
                    saving.took(partial(training.save_state, state))
        except TrainingFailed as error:
            if best is None:
                raise
            log.warning("training_stopped", reason=error.detail)  # what came before is good all the same
            break
        file = training.candidate(folder, until)
        if training.trainer.done == until:
            training.save_candidate(file)
        elif not file.exists():
            continue  # it was thrown away before
        report(Report("validating", training.trainer.done, steps, smooth))
        try:
            scores, samples = _judged(ground, lesson, file, of_base, open_judge, check)
        except (BadPicture, Blocked) as error:  # the others may be good
            log.warning("candidate_dropped", step=until, reason=error.detail)
            discard(file)
        else:
            best = _better(best, Trained(file, until, scores, samples, training.recipe, ground.mark))
            report(Report("validating", training.trainer.done, steps, smooth, samples[0]))
        training.save_state(state)
    if best is None:
        raise TrainingFailed("none of its candidates draws a picture", "Try fewer steps, or other pictures.")
    return best


def _better(one: Trained | None, other: Trained) -> Trained:
    """Returns the better candidate, and removes the other: a whole model takes gigabytes."""
    if one is None:
        return other
    worse, better = sorted((one, other), key=_worth)
    discard(worse.file)
    return better


def _worth(candidate: Trained) -> tuple[bool, float, int]:
    """Orders candidates: those to be published first, then by score where there is one to tell, then the later one."""
    scores = candidate.scores
    return scores.refusal() is None, scores.total if scores.likeness is not None else 0.0, candidate.step


def _judged(
    ground: Ground,
    lesson: Lesson,
    file: Path,
    of_base: Sequence[Image.Image],
    open_judge: OpenJudge,
    check: Check,
) -> tuple[Scores, Sequence[Image.Image]]:
    """Returns how good the candidate in `file` is, and its samples."""
    base = ground.base

    def run(action: Callable[[], T]) -> T:
        check()
        return ground.batch.run_behind(action)

    plain = _requests(base, f"a {lesson.noun}", SAMPLES)
    drawn = by_candidate(ground, file, [*_requests(base, lesson.who, SAMPLES), *plain[:OF_CLASS]], check)
    photos = [square(photo, learned_side(base.pipeline, None)) for photo in lesson.photos]
    own, others = drawn[:SAMPLES], drawn[SAMPLES:]
    shown = Shown(photos, own, of_base, others, [request.prompt for request in plain])
    return judge(open_judge(), shown, run), own


def _decoded(ground: Ground, latents: Tensor) -> Image.Image:
    return ground.batch.run_behind(partial(decode, ground.base.pipeline, latents[None], checked=False))[0]
