"""Generating: a claimed job becomes pictures on the disk and the rows that tell of them."""

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from api.domain.jobs import Finished
from api.domain.png_text import describe, with_text
from api.domain.submit import request_of
from api.model_service import ModelService
from api.store.files import PictureFolder
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


async def generate(studio: Studio, job: Request, on_step: "OnStep") -> Finished:
    """Draws the pictures of `job` and saves them; nothing is known of them before `jobs.publish`.

    Raises:
        SitterError: nothing was drawn, or nothing could be saved; or whatever `on_step` raised.
    """
    return await anyio.to_thread.run_sync(_generate, studio, job, on_step, abandon_on_cancel=False)


def _generate(studio: Studio, job: Request, on_step: "OnStep") -> Finished:
    began = time.perf_counter()
    waited = max(0.0, (now() - job.created_at).total_seconds())
    request = request_of(job, studio.vault)
    generation = studio.models.generate(request, on_step)
    seconds = time.perf_counter() - began
    images = []
    for position, (drawn, seed) in enumerate(zip(generation.pngs, generation.seeds, strict=True)):
        png = drawn
        if not job.sensitive:
            png = with_text(png, describe(request, generation.model_id, seed, job.id))
        path = studio.pictures.save(picture_name(job, position), png)
        images.append(
            Image(
                request_id=job.id,
                position=position,
                user_id=job.user_id,
                image_url=path.name,
                description=job.description,
                sensitive=job.sensitive,
                words="" if job.sensitive else job.description.lower(),
                model_id=generation.model_id,
                width=request.width,
                height=request.height,
                seed=seed,
                bytes=len(png),
                sha256=hashlib.sha256(png).hexdigest(),
                category=job.category,
                processing_time=seconds / len(generation.pngs),
            )
        )
    timings = generation.timings.model_dump()
    timings["queue"] += waited
    warnings = [SENSITIVE_WARNING] if job.sensitive and generation.unread else generation.warnings
    return Finished(images, generation.model_id, generation.cache_hit, timings, warnings, seconds)


def picture_name(job: Request, position: int) -> str:
    """Returns the file name of a job's picture: the same whenever the job runs, and nobody else's."""
    number = f"_{position + 1}" if position else ""
    return f"{job.user_id}_{job.created_at:%Y%m%d_%H%M%S}_{job.id[-8:]}{number}.png"
