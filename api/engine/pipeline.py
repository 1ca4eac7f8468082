"""Drawing: one request, from a leased model to finished pixels, in the lane that suits it.

The batch draws what it can: base, adapter and sampler of every request in one forward with those of others; so it does
with what stands for a whole checkpoint (delta). A LoRA that does not fit its slots, and a request that shall not depend
on its neighbours, have a copy of the UNet's tree to themselves there (exact). What the step loop cannot do at all is
left to diffusers' own call (stock), and so is every base that is no Stable Diffusion.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from api.engine import sampler, stock
from api.engine.adapters import Adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.preview import preview, shows
from api.engine.sampler import Schedule
from api.engine.slots import Slots
from api.engine.stock import StockBase
from api.engine.stock_adapters import StockAdapter
from api.engine.tasks import Task
from api.engine.threads import in_own_thread
from api.errors import BadPicture, Blocked, ModelUnavailable
from api.schemas import GenerateRequest, Lane

LOST = "the model lost its way: the latents are not finite"
NO_PIXELS = "the decoder's pixels are not finite"

_decoding = threading.Lock()  # one at a time, so that the decoder's peak stays that of one
_stock_call = threading.Lock()
CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class Step:
    """A denoising step that is done: `done` of `of`, and what the first picture looks like, as a small JPEG.

    `preview` returns None where the latents do not show that.
    """

    done: int
    of: int
    preview: Callable[[], bytes | None]


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Drawing:
    """Finished pictures and how they were made.

    Attributes:
        images: one for each that was asked for.
        lane: where they were denoised.
        denoise_seconds: from the request to the last step, the steps of others included.
        device_seconds: its share of the time that the device took for it.
        decode_seconds: from latents to pixels.
        unread: what of the prompts was not read, by field of the request.
        notes: what else of the request the model could not do, in sentences for people.
    """

    images: list[Image.Image]
    lane: Lane
    denoise_seconds: float
    device_seconds: float
    decode_seconds: float
    unread: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Denoised:
    latents: Tensor
    lane: Lane
    device_seconds: float


def draw(
    base: Base,
    adapter: Adapter | None,
    request: GenerateRequest,
    seed: int,
    batch: Batch,
    on_step: OnStep,
    check: Callable[[], None] = lambda: None,
    decoder: AutoencoderTiny | None = None,
    behind: bool = False,
) -> Drawing:
    """Returns the pictures of `request`, the first from `seed`, the next from `seed + 1` and so on. Blocks.

    Args:
        base: what draws.
        adapter: the user's LoRA over it, or None.
        request: what to draw.
        seed: where the noise comes from; drawn on the CPU, so that it is the same on every device.
        batch: the step loop.
        on_step: called after each step, on the thread of the lane; whatever it raises ends the drawing.
        check: called now and then while the request waits for its first step; whatever it raises ends the drawing.
        decoder: makes the pixels in place of the base's own; None for that one.
        behind: it gives way to the drawings of others.

    Raises:
        BadPicture: latents or pixels are not finite.
        Blocked: the model's safety checker refused a picture.
    """
    pipeline = base.pipeline

    def stepped(done: int, of: int, latents: Tensor) -> None:
        on_step(Step(done, of, partial(preview, latents[0], pipeline.vae)))

    with torch.inference_mode():
        started = time.perf_counter()
        schedule = _schedule(base, request)
        if schedule is None:
            denoised = _by_stock_call(base, adapter, request, seed, stepped, check)
        else:
            denoised = _in_batch(base, adapter, request, seed, schedule, batch, stepped, check, behind)
        done = time.perf_counter()
        run = batch.run_behind if behind else batch.run
        images, decode_seconds = run(partial(_decode_timed, pipeline, decoder, denoised.latents))
    return Drawing(
        [sized(image, request.width, request.height) for image in images],
        denoised.lane,
        done - started,
        denoised.device_seconds + decode_seconds,
        decode_seconds,
        _unread(base.texts.beyond, request),
    )


def latents_of(base: Base, request: GenerateRequest, batch: Batch, check: Callable[[], None]) -> Tensor:
    """Returns what the base alone denoises for `request`: (pictures, channels, h/f, w/f) float32.

    Raises:
        ModelUnavailable: the step loop cannot draw with this base.
        BadPicture: they are not finite.
    """
    schedule = _schedule(base, request)
    if schedule is None:
        raise ModelUnavailable("the step loop cannot draw with this base", "Only Stable Diffusion can be trained.")
    with torch.inference_mode():
        return _in_batch(
            base, None, request, request.seed or 0, schedule, batch, lambda done, of, latents: None, check, True
        ).latents


def draw_stock(
    base: StockBase,
    adapter: StockAdapter | None,
    request: GenerateRequest,
    seed: int,
    on_step: OnStep,
    check: Callable[[], None] = lambda: None,
) -> Drawing:
    """Returns the pictures of `request` by a base that is no Stable Diffusion, as `draw` does."""
    ended = started = time.perf_counter()

    def stepped(done: int, of: int, latents: Tensor) -> None:
        nonlocal ended
        if not torch.isfinite(latents).all():
            raise BadPicture(LOST)
        ended = time.perf_counter()
        vae = base.pipeline.vae
        on_step(Step(done, of, partial(preview, latents[0], vae) if shows(latents, vae) else lambda: None))

    @torch.inference_mode()
    def pictures() -> list[Image.Image]:
        pixels = stock.pictures(base, adapter, request, _generators(request, seed), stepped)
        if not torch.isfinite(pixels).all():
            raise BadPicture(NO_PIXELS)
        images: list[Image.Image] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
        return images

    with _one_stock_call(check):
        began = time.perf_counter()
        images = in_own_thread(pictures)
        unread = _unread(partial(stock.beyond, base), request)
    done = time.perf_counter()
    return Drawing(
        [sized(image, request.width, request.height) for image in images],
        "stock",
        ended - started,
        done - began,
        done - ended,
        unread,
        stock.notes(base, request),
    )


def _schedule(base: Base, request: GenerateRequest) -> Schedule | None:
    """Returns the sampler's table; None when only the stock call can draw the request."""
    if not base.fits_the_batch:
        return None
    own = base.pipeline.scheduler
    config = {**own.config, "_class_name": type(own).__name__}
    try:
        return sampler.schedule(request.scheduler, config, request.num_inference_steps)
    except ModelUnavailable:  # it is no table of numbers
        return None


def _in_batch(
    base: Base,
    adapter: Adapter | None,
    request: GenerateRequest,
    seed: int,
    schedule: Schedule,
    batch: Batch,
    stepped: Callable[[int, int, Tensor], None],
    check: Callable[[], None],
    behind: bool,
) -> _Denoised:
    shared = base.shared_unet(adapter)
    rides = adapter is not None and not request.reproducible and shared.fits(adapter)
    model = shared if rides or (adapter is None and not request.reproducible) else base.own_unet()
    task = batch.join(partial(_task, base, adapter, request, seed, schedule, model, stepped, check, behind))
    return _Denoised(task.ended.result(), _lane(adapter, rides), task.seconds)


@torch.inference_mode()
def _task(
    base: Base,
    adapter: Adapter | None,
    request: GenerateRequest,
    seed: int,
    schedule: Schedule,
    model: Slots,
    stepped: Callable[[int, int, Tensor], None],
    check: Callable[[], None],
    behind: bool,
) -> Task:
    pipeline = base.pipeline
    width, height = drawn_size(pipeline, request.width, request.height)
    cell = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // cell, width // cell)
    guided = request.guidance_scale > 1
    texts = [request.negative_prompt or "", request.prompt] if guided else [request.prompt]
    encode = base.texts.encode_alone if request.reproducible else base.texts.encode
    text = torch.cat([encode(text, adapter).expand(request.num_images, -1, -1) for text in texts])
    generators = _generators(request, seed)
    noise = torch.cat([torch.randn(shape, generator=one) for one in generators])
    return Task(
        model=model,
        adapter=adapter,
        user_id=request.user_id,
        schedule=schedule,
        state=sampler.start(noise, schedule).to(pipeline.device),
        text=text.to(base.unet.dtype),
        guidance_scale=request.guidance_scale,
        guidance_rescale=stock.guidance_rescale(pipeline),
        generators=generators,
        behind=behind,
        alone=request.reproducible,
        on_call=lambda done, latents: stepped(done, schedule.calls, latents),
        check=check,
    )


def _lane(adapter: Adapter | None, rides: bool) -> Lane:
    if adapter is None or not rides:
        return "exact"
    return "delta" if adapter.of_checkpoint else "batch"


def _by_stock_call(
    base: Base,
    adapter: Adapter | None,
    request: GenerateRequest,
    seed: int,
    stepped: Callable[[int, int, Tensor], None],
    check: Callable[[], None],
) -> _Denoised:
    size = drawn_size(base.pipeline, request.width, request.height)
    with _one_stock_call(check):
        began = time.perf_counter()
        draw = partial(stock.draw, base.pipeline, adapter, request, size, _generators(request, seed), stepped)
        latents = in_own_thread(torch.inference_mode()(draw))
        return _Denoised(latents, "stock", time.perf_counter() - began)


@contextmanager
def _one_stock_call(check: Callable[[], None]) -> Iterator[None]:
    """Waits until nobody else is in the stock lane, calling `check` now and then."""
    while not _stock_call.acquire(timeout=CHECK_SECONDS):
        check()
    try:
        yield
    finally:
        _stock_call.release()


def _generators(request: GenerateRequest, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(request.num_images)]


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


def _unread(beyond: Callable[[str], str], request: GenerateRequest) -> dict[str, str]:
    """Returns the end of each prompt that the model does not read, of which `beyond` tells."""
    texts = {"prompt": request.prompt}
    if request.negative_prompt and request.guidance_scale > 1:
        texts["negative_prompt"] = request.negative_prompt
    return {field: end for field, text in texts.items() if (end := beyond(text))}


@torch.inference_mode()
def _decode_timed(pipeline: StableDiffusionPipeline, vae: Any, latents: Tensor) -> tuple[list[Image.Image], float]:
    """Returns the pictures, and the seconds that they took."""
    with _decoding:
        began = time.perf_counter()
        return decode(pipeline, latents, vae), time.perf_counter() - began


@torch.inference_mode()
def decode(
    pipeline: StableDiffusionPipeline, latents: Tensor, decoder: Any = None, checked: bool = True
) -> list[Image.Image]:
    """Returns the pictures that `decoder`, or the pipeline's own, makes of `latents` (pictures, channels, h/f, w/f).

    Raises:
        BadPicture: latents or pixels are not finite.
        Blocked: they are to be `checked`, and the model's safety checker refused one.
    """
    vae = decoder or pipeline.vae
    if not torch.isfinite(latents).all():
        raise BadPicture(LOST)
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(scaled, return_dict=False)[0]
    if not torch.isfinite(pixels).all():  # known of SD's decoder in float16: once more in float32
        pixels = copy.deepcopy(vae).float().decode(scaled.float(), return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        raise BadPicture(NO_PIXELS)
    if checked:
        _, unsafe = pipeline.run_safety_checker(pixels, pixels.device, pipeline.unet.dtype)
        if unsafe and any(unsafe):
            raise Blocked("the model's safety checker refused the picture")
    images: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images
