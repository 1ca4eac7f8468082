"""Generating: a request becomes pictures on the disk and an answer about them."""

import base64
import time
from dataclasses import dataclass
from datetime import datetime

from api.model_service import ModelService
from api.schemas import GeneratedImage, GenerateRequest, GenerateResponse
from api.store.files import PictureFolder


@dataclass(frozen=True)
class Generated:
    """The answer, the first picture's PNG, and the fields of the request that were too long to be read whole."""

    response: GenerateResponse
    png: bytes
    cut: list[str]


def generate(request: GenerateRequest, models: ModelService, pictures: PictureFolder) -> Generated:
    """Draws, saves and describes the pictures of `request`. Blocks until that is done.

    Raises:
        SitterError: nothing was drawn, or nothing could be saved.
    """
    began = time.perf_counter()
    generation = models.generate(request)
    paths = pictures.save_all(request.user_id, generation.pngs, datetime.now())
    images = [
        GeneratedImage(image_id=path.stem, image_base64=base64.b64encode(png).decode(), image_path=str(path), seed=seed)
        for path, png, seed in zip(paths, generation.pngs, generation.seeds, strict=True)
    ]
    first = images[0]
    response = GenerateResponse(
        success=True,
        message="Image generated successfully",
        **first.model_dump(),
        model_id=generation.model_id,
        generation_time=round(time.perf_counter() - began, 3),
        cache="hit" if generation.cache_hit else "miss",
        timings=generation.timings,
        images=images,
        warnings=generation.warnings,
    )
    return Generated(response, generation.pngs[0], list(generation.unread))
