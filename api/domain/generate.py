"""Generating: a claimed job becomes pictures on the disk and the rows that tell of them."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread
from anyio import CapacityLimiter

from api.domain.jobs import Finished
from api.domain.library import delete_files, searchable
from api.domain.models import own_models
from api.domain.png_text import describe, with_text
from api.domain.submit import request_of
from api.engine.own import OwnModel
from api.errors import SitterError
from api.model_service import Generation, ModelService
from api.schemas import GenerateRequest
from api.store.database import Database
from api.store.files import PictureFolder, blur
from api.store.models import ModelFolder
from api.store.tables import Image, Request, now
from api.store.vault import Vault

if TYPE_CHECKING:
    from api.engine.pipeline import OnStep

SENSITIVE_WARNING = "The prompt is too long for this model, which did not read its end. Put what matters first."


@dataclass(frozen=True)
class Studio:
    """What drawing needs."""

    models: ModelService
    pictures: PictureFolder
    vault: Vault
    database: Database
    folder: ModelFolder


@dataclass(frozen=True)
class Drawn:
    """Pictures that nobody else knows of yet."""

    request: GenerateRequest
    generation: Generation
    waited_seconds: float
    seconds: float


async def draw(
    studio: Studio, job: Request, on_step: "OnStep", check: Callable[[], None], threads: CapacityLimiter
) -> Drawn:
    """Draws the pictures of `job`, on one of `threads`.

    Raises:
        SitterError: nothing was drawn; or whatever `on_step` or `check` raised.
    """
    own = await own_models(studio.database, studio.folder, job.user_id, job.versions or ())
    return await anyio.to_thread.run_sync(_draw, studio, job, own, on_step, check, limiter=threads)


async def save(studio: Studio, job: Request, drawn: Drawn) -> Finished:
    """Saves the pictures of `job`, each as a whole; nothing is known of them before `jobs.publish`.

    Raises:
        StorageFull, StorageUnavailable: they could not all be saved.
    """
    return await anyio.to_thread.run_sync(_save, studio, job, drawn)


def _draw(
    studio: Studio,
    job: Request,
    own: Sequence[tuple[OwnModel, float]],
    on_step: "OnStep",
    check: Callable[[], None],
) -> Drawn:
    began = time.perf_counter()
    waited = max(0.0, (now() - job.created_at).total_seconds())
    request = request_of(job, studio.vault)
    generation = studio.models.generate(request, on_step, check, own)
    return Drawn(request, generation, waited, time.perf_counter() - began)


def _save(studio: Studio, job: Request, drawn: Drawn) -> Finished:
    generation = drawn.generation
    images: list[Image] = []
    try:
        for seed, png in zip(generation.seeds, generation.pngs, strict=True):
            images.append(_save_one(studio, job, drawn, len(images), seed, png))
    except SitterError:
        for image in images:  # all of them or none
            studio.pictures.delete(image.image_url)
        raise
    timings = generation.timings.model_dump()
    timings["queue"] += drawn.waited_seconds
    cut = [SENSITIVE_WARNING, *generation.notes]
    warnings = cut if job.sensitive and generation.unread else generation.warnings
    return Finished(
        images,
        generation.model_id,
        generation.cache_hit,
        generation.lane,
        timings,
        warnings,
        generation.device_seconds,
    )


def _save_one(studio: Studio, job: Request, drawn: Drawn, position: int, seed: int, plain: bytes) -> Image:
    request, generation = drawn.request, drawn.generation
    png = plain if job.sensitive else with_text(plain, describe(request, generation.model_id, seed, job.id))
    path = studio.pictures.save(picture_name(job, job.attempt, position), png)
    return Image(
        request_id=job.id,
        position=position,
        user_id=job.user_id,
        image_url=path.name,
        description=job.description,
        sensitive=job.sensitive,
        words="" if job.sensitive else searchable(job.description),
        model_id=generation.model_id,
        base_hash=generation.base_hash,
        version_hash=generation.version_hash,
        width=request.width,
        height=request.height,
        seed=seed,
        bytes=len(png),
        sha256=hashlib.sha256(png).hexdigest(),
        blur=blur(plain),
        category=job.category,
        processing_time=drawn.seconds / len(generation.pngs),
    )


async def forget_earlier_attempts(studio: Studio, job: Request) -> None:
    """Removes what the attempts at `job` before this one may have saved and could not publish."""
    for attempt in range(1, job.attempt):
        await delete_files(studio.pictures, [picture_name(job, attempt, place) for place in range(job.images)])


def picture_name(job: Request, attempt: int, position: int) -> str:
    """Returns the file name of a picture, which no other job has.

    Each attempt has its own: a worker that wakes up late must not write over what another has published.
    """
    again = f"r{attempt}" if attempt > 1 else ""
    number = f"_{position + 1}" if position else ""
    return f"{job.user_id}_{job.created_at:%Y%m%d_%H%M%S}_{job.id[-12:]}{again}{number}.png"
