"""Pictures from a pipeline, at the service's defaults."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from api.engine.pipeline import drawn_size, sized

STEPS = 30
GUIDANCE = 7.5


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    width: int = 512,
    height: int = 512,
    guidance: float = GUIDANCE,
    batch: int = 4,
) -> list[NDArray[np.uint8]]:
    """One (height, width, 3) picture a prompt; picture i has seed `seed` + i whatever the batch. Guidance is rescaled
    (arXiv:2305.08891, section 3.4) and other sizes are scaled as the scheduler's private keys say, as the service
    does."""
    rescale = pipe.scheduler.config.get("_guidance_rescale", 0.0)
    drawn_width, drawn_height = drawn_size(pipe, width, height)
    pictures: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=drawn_width,
            height=drawn_height,
            guidance_rescale=rescale,
            generator=generators,
        ).images
        pictures += [np.asarray(sized(image, width, height)) for image in drawn]
    return pictures
