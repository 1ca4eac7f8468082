"""What a training makes: the files of a version, and what is known of it."""

import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.config import ModelSource
from api.domain.generate import Studio
from api.domain.models import TOKEN
from api.engine.lesson import Lesson
from api.store.disk import told
from api.store.models import SAMPLE, WEIGHTS, files_in, sha256
from api.store.tables import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from api.engine.dreambooth import OnReport

# What a job knows of its lesson besides the photos and the class.
LEARNED = ("kind", "steps", "rank", "seed", "flip", "resolution", "train_text_encoder", "prior_preservation")


@dataclass(frozen=True)
class Made:
    """The files of a version, in memory or to be copied, and what is known of it."""

    files: dict[str, bytes | Path]
    hashes: dict[str, str]
    bytes: int
    parameters: dict[str, Any]
    scores: dict[str, Any]
    refusal: str | None
    base_hash: str


def make(studio: Studio, job: Request, report: "OnReport", check: Callable[[], None]) -> Made:
    """Trains, and returns what comes of it; begun again it goes on from where it was. Blocks.

    Raises:
        StorageFull, StorageUnavailable: its state cannot be written.
        SitterError: nothing was learned; or whatever `report` or `check` raised.
    """
    began = time.monotonic()
    asked = job.parameters
    lesson = Lesson(
        studio.folder.photos_of(job.id),
        asked["class_noun"],
        TOKEN,
        **{name: asked[name] for name in LEARNED if name in asked},
    )
    base, work = ModelSource.model_validate(asked["source"]), studio.folder.work_of(job.id)
    with told(work.parent):
        trained = studio.models.train(base, lesson, work, report, check)
    samples = {f"{SAMPLE}{number}.png": _png(image) for number, image in enumerate(trained.samples, start=1)}
    weights = files_in(trained.file) if trained.file.is_dir() else {WEIGHTS: trained.file}
    files: dict[str, bytes | Path] = {**weights, **samples}
    return Made(
        files,
        {name: sha256(content) for name, content in files.items()},
        sum(map(len, samples.values())) + sum(path.stat().st_size for path in weights.values()),
        {**asdict(trained.recipe), "step": trained.step, "seconds": round(time.monotonic() - began, 1)},
        trained.scores.by_name(),
        trained.scores.refusal(),
        trained.base_hash,
    )


def _png(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
