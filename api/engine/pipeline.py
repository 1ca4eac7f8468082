"""Drawing: one request, one stock diffusers call, from a leased model to finished pixels."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from api.engine.adapters import Adapter, applied
from api.engine.preview import preview
from api.engine.sampler import SAMPLERS
from api.errors import BadPicture, Blocked
from api.schemas import GenerateRequest, Scheduler

SCHEDULERS: dict[str, type[Any]] = {name: SAMPLERS[name] for name in get_args(Scheduler)}


@dataclass(frozen=True)
class Step:
    """A denoising step that is done: `done` of `of`, and what the first picture looks like, as a small JPEG."""

    done: int
    of: int
    preview: Callable[[], bytes]


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Drawing:
    """Finished pictures, the seconds that denoising and decoding took, and what of the prompts was not read."""

    images: list[Image.Image]
    denoise_seconds: float
    decode_seconds: float
    unread: dict[str, str]  # by field of the request


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Adapter | None,
    request: GenerateRequest,
    seed: int,
    on_step: OnStep,
) -> Drawing:
    """Returns the pictures of `request`, the first from `seed`, the next from `seed + 1` and so on.

    The stock call does the denoising, with a scheduler and a pipeline object of its own: those keep state,
    the modules behind them do not. Decoding is ours, so that latents are checked before anything is saved.

    Args:
        pipeline: the base; nobody else draws with it meanwhile.
        adapter: LoRA applied for this drawing, or None.
        request: what to draw.
        seed: where the noise comes from; drawn on the CPU, so that it is the same on every device.
        on_step: called after each step; whatever it raises ends the drawing.

    Raises:
        BadPicture: latents or pixels are not finite.
        Blocked: the model's safety checker refused a picture.
    """
    own = StableDiffusionPipeline(
        **{**pipeline.components, "scheduler": _scheduler(pipeline, request.scheduler)},
        requires_safety_checker=False,
    )
    own.set_progress_bar_config(disable=True)

    def after_step(_: Any, index: int, __: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        look = partial(preview, tensors["latents"][0], own.vae)
        on_step(Step(index + 1, own.num_timesteps, look))  # some schedulers take a step more than asked
        return tensors

    width, height = drawn_size(pipeline, request.width, request.height)
    with torch.inference_mode(), applied(adapter, pipeline):
        started = time.perf_counter()
        latents = own(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_images_per_prompt=request.num_images,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            # A model trained to zero terminal SNR says here how far guidance may widen its range:
            # https://arxiv.org/abs/2305.08891, section 3.4.
            guidance_rescale=pipeline.scheduler.config.get("_guidance_rescale", 0.0),
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(request.num_images)],
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
        denoised = time.perf_counter()
        images = [sized(image, request.width, request.height) for image in _decode(own, latents)]
    decoded = time.perf_counter()
    return Drawing(images, denoised - started, decoded - denoised, _unread(pipeline.tokenizer, request))


def drawn_size(pipeline: StableDiffusionPipeline, width: int, height: int) -> tuple[int, int]:
    """Returns the pixels that are drawn for a picture of `width` × `height`; it is scaled to its size afterwards.

    They are its own, except where a model says in `_shorter_side` of its scheduler's configuration that it draws well
    at that shorter side alone.
    """
    side = pipeline.scheduler.config.get("_shorter_side")
    if side is None:
        return width, height
    step, scale = pipeline.vae_scale_factor, side / min(width, height)
    return round(width * scale / step) * step, round(height * scale / step) * step


def sized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Returns `image` at that size in pixels."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def _unread(tokenizer: Any, request: GenerateRequest) -> dict[str, str]:
    """Returns the end of each prompt that is longer than the text encoder reads."""
    texts = {"prompt": request.prompt}
    if request.negative_prompt and request.guidance_scale > 1:
        texts["negative_prompt"] = request.negative_prompt
    return {field: end for field, text in texts.items() if (end := _beyond(tokenizer, text))}


def _beyond(tokenizer: Any, text: str) -> str:
    most = tokenizer.model_max_length
    tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
    if len(tokens.input_ids) <= most:
        return ""
    start, _ = tokens.offset_mapping[most - 1]  # the last place that is read is the end token's
    return text[start:]


def _scheduler(pipeline: StableDiffusionPipeline, name: str | None) -> Any:
    kind = SCHEDULERS[name] if name else type(pipeline.scheduler)
    # Left to itself DDIM clips latents as if they were pixels; the pipeline still mends that, and says it will not.
    return kind.from_config({"clip_sample": False, **pipeline.scheduler.config})


def _decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Returns the pictures of `latents` (pictures, channels, h/f, w/f)."""
    if not torch.isfinite(latents).all():
        raise BadPicture("the model lost its way: the latents are not finite")
    scaled = latents / pipeline.vae.config.scaling_factor
    pixels = pipeline.vae.decode(scaled, return_dict=False)[0]
    if not torch.isfinite(pixels).all():  # known of SD's decoder in float16: once more in float32
        pixels = copy.deepcopy(pipeline.vae).float().decode(scaled.float(), return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        raise BadPicture("the decoder's pixels are not finite")
    _, unsafe = pipeline.run_safety_checker(pixels, pixels.device, pipeline.unet.dtype)
    if unsafe and any(unsafe):
        raise Blocked("the model's safety checker refused the picture")
    images: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images
