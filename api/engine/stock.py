"""The stock lane: what the step loop cannot take is drawn by diffusers' own call, one drawing at a time."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from api.engine.adapters import COMPONENTS, Adapter, merged
from api.engine.sampler import SAMPLERS
from api.schemas import GenerateRequest


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Adapter | None,
    request: GenerateRequest,
    size: tuple[int, int],
    generators: list[torch.Generator],
    on_step: Callable[[int, int, Tensor], None],
) -> Tensor:
    """Returns the latents of the request's pictures (pictures, channels, height, width).

    The call has a scheduler, a tokenizer and a pipeline object of its own: those keep state, the modules behind them do
    not. It computes its latents in the precision of the UNet, so that is the decoder's here: bfloat16 would do for the
    UNet alone.

    Args:
        pipeline: the base.
        adapter: LoRA, merged into a copy of what it changes, or None.
        request: what to draw.
        size: width and height in pixels.
        generators: one for each picture.
        on_step: called after each step with how many are done, how many there are, and the latents.
    """
    modules = {name: _in_full(getattr(pipeline, name), pipeline.vae.dtype) for name in COMPONENTS}
    changed = {name: merged(module, adapter, name) for name, module in modules.items()} if adapter else modules
    own_state = {
        "scheduler": _scheduler(pipeline, request.scheduler),
        "tokenizer": copy.deepcopy(pipeline.tokenizer),
    }
    own = StableDiffusionPipeline(**{**pipeline.components, **changed, **own_state}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)

    def after_step(_: Any, index: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(index + 1, own.num_timesteps, tensors["latents"])  # some schedulers take a step more than asked
        return tensors

    latents: Tensor = own(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_images_per_prompt=request.num_images,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=guidance_rescale(pipeline),
        width=size[0],
        height=size[1],
        generator=generators,
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    return latents


def _in_full(module: Any, dtype: torch.dtype) -> Any:
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)


def guidance_rescale(pipeline: StableDiffusionPipeline) -> float:
    """Returns how far guidance may widen the range of a model trained to zero terminal SNR, 0 for others.

    See https://arxiv.org/abs/2305.08891, section 3.4.
    """
    return float(pipeline.scheduler.config.get("_guidance_rescale", 0.0))


def _scheduler(pipeline: StableDiffusionPipeline, name: str | None) -> Any:
    kind = SAMPLERS[name] if name else type(pipeline.scheduler)
    # Left to itself DDIM clips latents as if they were pixels; the pipeline still mends that, and says it will not.
    return kind.from_config({"clip_sample": False, **pipeline.scheduler.config})
