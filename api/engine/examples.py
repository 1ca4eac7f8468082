"""What a training learns from: squares of photos, and of pictures of the class, as latents with the words for them."""

import copy
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from api.engine.batch import Batch
from api.engine.lesson import Lesson
from api.engine.pipeline import decode, drawn_size
from api.engine.trainer import Examples
from api.engine.weights import load_noted, save_whole
from api.errors import InvalidRequest

WORDINGS = (
    "photo of {}",
    "a photo of {}",
    "portrait of {}",
    "a portrait of {}",
    "picture of {}",
    "a close photo of {}",
)
LEAST_SIDE = 256  # pixels
Check = Callable[[], None]


def side_of(pipeline: Any) -> int:
    """Returns the side in pixels of the pictures that the base was trained on."""
    return max(LEAST_SIDE, int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor))


def learned_side(pipeline: Any, wanted: int | None) -> int:
    """Returns the side in pixels of the squares that are learned: `wanted`, or the base's own.

    The UNet must be able to halve their latents as often as it does, and a base that draws at one size alone has to
    learn at that.

    Raises:
        InvalidRequest: squares of `wanted` pixels cannot be learned.
    """
    own, _ = drawn_size(pipeline, side_of(pipeline), side_of(pipeline))
    step = int(pipeline.vae_scale_factor) * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    only = "_shorter_side" in pipeline.scheduler.config
    if wanted in (None, own):
        return own
    if only or wanted % step or not LEAST_SIDE <= wanted <= own:
        least = -(-LEAST_SIDE // step) * step
        smaller = f", and multiples of {step} from {least} on" if not only and least < own else ""
        raise InvalidRequest(f"this base cannot learn squares of {wanted} pixels", f"{own} will do{smaller}.")
    return wanted


def square(photo: bytes, side: int) -> Image.Image:
    """Returns the square of a photo that is learned: its middle, and above that where faces are."""
    with Image.open(io.BytesIO(photo), formats=("PNG",)) as image:
        return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, centering=(0.5, 0.35))


def of_photos(pipeline: Any, batch: Batch, lesson: Lesson, side: int, check: Check) -> Examples:
    """Returns every photo, and perhaps its mirror image, with every wording."""
    latents = list[Tensor]()
    for photo in lesson.photos:
        check()
        image = square(photo, side)
        images = [image, ImageOps.mirror(image)] if lesson.flip else [image]
        latents += batch.run_behind(partial(encoded, pipeline, images))
    words = [wording.format(lesson.who) for wording in WORDINGS]
    photos = batch.run_behind(lambda: torch.stack(latents).repeat_interleave(len(words), dim=0))
    return Examples(photos, words * len(latents))


def resized(pipeline: Any, batch: Batch, latents: Tensor, side: int, check: Check) -> Tensor:
    """Returns, on the host, the latents of the same pictures (pictures, channels, height, width) at another size."""

    def one(drawn: Tensor) -> Tensor:
        [picture] = decode(pipeline, drawn[None], checked=False)
        return encoded(pipeline, [picture.resize((side, side), Image.Resampling.LANCZOS)])[0]

    changed = list[Tensor]()
    for drawn in latents:
        check()
        changed.append(batch.run_behind(partial(one, drawn)))
    return batch.run_behind(lambda: torch.stack(changed).cpu())


@torch.no_grad()
def encoded(pipeline: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    """Returns the latents of each (channels, height, width), in float32."""
    pixels = torch.cat([pipeline.image_processor.preprocess(one) for one in images])
    latents = _mean(pipeline.vae, pixels)
    if not torch.isfinite(latents).all():  # known of SDXL's encoder in float16: once more in float32
        latents = _mean(copy.deepcopy(pipeline.vae).float(), pixels)
    return list(latents.float())


def _mean(vae: Any, pixels: Tensor) -> Tensor:
    latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    return latents


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """Returns what is kept in `file`, or what `make` makes now, on the host."""
    tensors = load_noted(file)
    if tensors is None:
        tensors = {"latents": make()}
        save_whole(tensors, file)
    return tensors["latents"]
