"""The stock lane: what the step loop cannot take is drawn by diffusers' own call, one drawing at a time.

Of Stable Diffusion that is a sampler that is no table of numbers. Of every other text-to-image pipeline of diffusers
it is all there is: the call is given what its signature has of a request, and what comes out is what it decodes itself.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from api.engine.adapters import COMPONENTS, Adapter, merged
from api.engine.sampler import SAMPLERS
from api.engine.stock_adapters import StockAdapter
from api.engine.text2image import parameters_of
from api.errors import Blocked
from api.schemas import GenerateRequest

OnLatents = Callable[[int, int, Tensor], None]
"""Called after each step with how many are done, how many there are, and the latents; what it raises ends the call."""

NO_NEGATIVE_PROMPT = "This model takes no negative prompt, and was drawn without it. Say in the prompt what is wanted."


@dataclass(frozen=True, eq=False)
class StockBase:
    """What users' models over any other pipeline than Stable Diffusion's have in common: the pipeline, as loaded."""

    pipeline: DiffusionPipeline


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Adapter | None,
    request: GenerateRequest,
    size: tuple[int, int],
    generators: list[torch.Generator],
    on_step: OnLatents,
) -> Tensor:
    """Returns the latents of the request's pictures (pictures, channels, height, width).

    The call has a scheduler, a tokenizer and a pipeline object of its own: those keep state, the modules behind them do
    not. It computes its latents in the precision of the UNet, so that is the decoder's here: bfloat16 would do for the
    UNet alone.

    Args:
        pipeline: the base, a Stable Diffusion.
        adapter: LoRA, merged into a copy of what it changes, or None.
        request: what to draw.
        size: width and height in pixels.
        generators: one for each picture.
        on_step: see `OnLatents`.
    """
    modules = {name: _in_full(getattr(pipeline, name), pipeline.vae.dtype) for name in COMPONENTS}
    changed = {name: merged(module, adapter, name) for name, module in modules.items()} if adapter else modules
    own_state = {
        "scheduler": _scheduler(pipeline, request.scheduler),
        "tokenizer": copy.deepcopy(pipeline.tokenizer),
    }
    own = StableDiffusionPipeline(**{**pipeline.components, **changed, **own_state}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    latents: Tensor = _call(
        own,
        on_step,
        **_asked(request, size, generators),
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale,
        guidance_rescale=guidance_rescale(pipeline),
        output_type="latent",
    ).images
    return latents


def _in_full(module: Any, dtype: torch.dtype) -> Any:
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)


def pictures(
    base: StockBase,
    adapter: StockAdapter | None,
    request: GenerateRequest,
    generators: list[torch.Generator],
    on_step: OnLatents,
) -> Tensor:
    """Returns the request's pictures (pictures, 3, height, width), from 0 to 1; see `draw`.

    One at a time: the modules of some pipelines do keep state while they draw.

    Raises:
        Blocked: the model's safety checker refused a picture.
    """
    own = copy.copy(base.pipeline)
    changed = adapter.modules if adapter else {}
    if own.vae.dtype == torch.float16 and own.vae.config.get("force_upcast"):
        # The call puts it into float32 for a while, in place.
        changed = {**changed, "vae": copy.deepcopy(own.vae)}
    flows = isinstance(own.scheduler, FlowMatchEulerDiscreteScheduler)  # it is what "euler" stands for, then
    own.register_modules(**changed, scheduler=_scheduler(own, None if flows else request.scheduler))
    result = _call(
        own,
        on_step,
        **_asked(request, (request.width, request.height), generators),
        **_guidance(parameters_of(type(own).__call__), request),
        output_type="pt",
    )
    if any(getattr(result, "nsfw_content_detected", None) or ()):
        raise Blocked("the model's safety checker refused the picture")
    drawn: Tensor = result.images
    return drawn


def _asked(request: GenerateRequest, size: tuple[int, int], generators: list[torch.Generator]) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "num_images_per_prompt": request.num_images,
        "num_inference_steps": request.num_inference_steps,
        "width": size[0],
        "height": size[1],
        "generator": generators,
    }


def _guidance(takes: Mapping[str, Parameter], request: GenerateRequest) -> dict[str, Any]:
    """Returns how the call is told of guidance, which `guidance_scale` of a request is the strength of.

    Where the call has a `true_cfg_scale`, that is classifier-free guidance, and `guidance_scale` is a number that the
    model was distilled to read. The first begins with a negative prompt: Qwen-Image is meant to be drawn so, and is
    given an empty one; FLUX is when somebody asks for one.
    """
    scale, negative = request.guidance_scale, request.negative_prompt
    if "true_cfg_scale" not in takes:
        given = {"guidance_scale": scale, "negative_prompt": negative}
    elif negative or takes["true_cfg_scale"].default > 1:
        given = {"true_cfg_scale": scale, "negative_prompt": negative or " "}
    else:
        given = {"guidance_scale": scale}
    return {name: value for name, value in given.items() if name in takes and value}


def notes(base: StockBase, request: GenerateRequest) -> list[str]:
    """Returns what of the request the model cannot do, in sentences for people.

    A negative prompt is such a wish: the picture is what the prompt says all the same, and a client that sends one
    with every request keeps working.
    """
    ignored = request.negative_prompt and "negative_prompt" not in parameters_of(type(base.pipeline).__call__)
    return [NO_NEGATIVE_PROMPT] if ignored else []


def beyond(base: StockBase, text: str) -> str:
    """Returns the end of `text` that none of the tokenizers of the base hands on, empty where one hands on all."""
    ends = (_beyond(tokenizer, most, text) for tokenizer, most in _readers(base))
    return min(ends, key=len, default="")


def _beyond(tokenizer: Any, most: int, text: str) -> str:
    tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
    if len(tokens.input_ids) <= most:
        return ""
    start, _ = tokens.offset_mapping[most - 1]  # the last place that is read is the end token's
    return text[start:]


def _readers(base: StockBase) -> list[tuple[PreTrainedTokenizerBase, int]]:
    """Returns the tokenizers of the base, and how many tokens each hands on."""
    takes = parameters_of(type(base.pipeline).__call__)
    most = takes["max_sequence_length"].default if "max_sequence_length" in takes else None
    tokenizers = [part for part in base.pipeline.components.values() if isinstance(part, PreTrainedTokenizerBase)]
    return [(one, min(one.model_max_length, most or one.model_max_length)) for one in tokenizers if one.is_fast]


def _call(own: DiffusionPipeline, on_step: OnLatents, **arguments: Any) -> Any:
    """Returns what the pipeline's own call makes of `arguments`, telling `on_step` in the way that it knows."""

    def after_step(_: Any, index: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after(index, None, tensors["latents"])
        return tensors

    def after(index: int, _: Any, latents: Tensor) -> None:
        steps = getattr(own, "num_timesteps", None) or len(own.scheduler.timesteps)
        on_step(index + 1, steps, latents)  # some schedulers take a step more than asked

    takes = parameters_of(type(own).__call__)
    told = {"callback_on_step_end": after_step} if "callback_on_step_end" in takes else {"callback": after}
    return own(**arguments, **told)


def guidance_rescale(pipeline: StableDiffusionPipeline) -> float:
    """Returns how far guidance may widen the range of a model trained to zero terminal SNR, 0 for others.

    See https://arxiv.org/abs/2305.08891, section 3.4.
    """
    return float(pipeline.scheduler.config.get("_guidance_rescale", 0.0))


def _scheduler(pipeline: DiffusionPipeline, name: str | None) -> Any:
    kind = SAMPLERS[name] if name else type(pipeline.scheduler)
    # Left to itself DDIM clips latents as if they were pixels; the pipeline still mends that, and says it will not.
    return kind.from_config({"clip_sample": False, **pipeline.scheduler.config})
