"""The stock lane draws to the last bit what the bare call draws."""

from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from api.config import Scheduler
from api.engine import stock
from api.engine.adapters import Adapter, LayerDelta
from api.engine.sampler import SAMPLERS
from api.schemas import GenerateRequest
from tests import builders

SIZE = (96, 64)  # pixels, width and height


@pytest.fixture
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture
def adapter(base: StableDiffusionPipeline) -> Adapter:
    """Of a rank that fits no slots."""
    deltas = []
    for component, layers in (("unet", builders.UNET_LAYERS), ("text_encoder", builders.TEXT_LAYERS)):
        pairs = builders.factors(getattr(base, component), layers, rank=130)
        deltas += [LayerDelta(component, name, pair["A"], pair["B"], 0.05) for name, pair in pairs.items()]
    return Adapter(tuple(deltas))


def generators(request: GenerateRequest) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + index) for index in range(request.num_images)]


def ours(
    base: StableDiffusionPipeline, adapter: Adapter | None = None, on_step: Any = lambda *_: None, **fields: Any
) -> Tensor:
    request = builders.request(**fields)
    return stock.draw(base, adapter, request, SIZE, generators(request), on_step)


def theirs(base: StableDiffusionPipeline, adapter: Adapter | None = None, **fields: Any) -> Tensor:
    request = builders.request(**fields)
    kind = SAMPLERS[request.scheduler] if request.scheduler else type(base.scheduler)
    components = {
        **builders.with_merged(base, adapter).components,
        "scheduler": kind.from_config(base.scheduler.config),
    }
    own = StableDiffusionPipeline(**components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    latents: Tensor = own(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        generator=generators(request),
        output_type="latent",
    ).images
    return latents


@pytest.mark.parametrize(
    "fields",
    [
        *({"scheduler": name, "num_inference_steps": 4} for name in (None, *get_args(Scheduler))),
        {"num_images": 3},
        {"guidance_scale": 1.0},
        {"negative_prompt": "glasses"},
        {"prompt": "word " * 400},
    ],
    ids=str,
)
def test_the_latents_are_those_of_the_bare_call(base: StableDiffusionPipeline, fields: dict[str, Any]) -> None:
    latents = ours(base, **fields)
    assert latents.shape == (fields.get("num_images", 1), 4, 8, 12)
    assert torch.equal(latents, theirs(base, **fields))


def test_an_adapter_draws_as_merged_and_the_base_stays_as_it_is(
    base: StableDiffusionPipeline, adapter: Adapter
) -> None:
    plain = theirs(base)
    scheduler, parameters = base.scheduler, dict(base.unet.named_parameters())
    values = {name: value.clone() for name, value in parameters.items()}
    latents = ours(base, adapter, scheduler="euler")
    assert torch.equal(latents, theirs(base, adapter, scheduler="euler"))
    assert (latents - ours(base, scheduler="euler")).abs().max() > 0.1
    assert base.scheduler is scheduler
    assert all(value is parameters[name] for name, value in base.unet.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in parameters.items())
    assert torch.equal(ours(base), plain)


def test_a_unet_that_is_told_the_guidance_draws_as_the_bare_call(base: StableDiffusionPipeline) -> None:
    """As those of latent consistency models are."""
    base.register_modules(unet=UNet2DConditionModel(**builders.UNET, time_cond_proj_dim=8))
    assert torch.equal(ours(base, guidance_scale=8.0), theirs(base, guidance_scale=8.0))
    assert not torch.equal(ours(base, guidance_scale=8.0), ours(base, guidance_scale=2.0))


def test_rescaled_guidance_is_that_of_the_configuration(base: StableDiffusionPipeline) -> None:
    assert stock.guidance_rescale(base) == 0.0
    plain = ours(base, guidance_scale=15.0)
    base.register_modules(scheduler=DDIMScheduler.from_config({**builders.SCHEDULER, "_guidance_rescale": 0.7}))
    assert stock.guidance_rescale(base) == 0.7
    assert not torch.equal(ours(base, guidance_scale=15.0), plain)


def test_ddim_never_clips_latents_as_if_they_were_pixels(base: StableDiffusionPipeline) -> None:
    unclipped = ours(base, scheduler="ddim")
    silent = {name: value for name, value in builders.SCHEDULER.items() if name != "clip_sample"}
    base.register_modules(scheduler=EulerDiscreteScheduler.from_config(silent))
    assert "clip_sample" not in base.scheduler.config
    assert torch.equal(ours(base, scheduler="ddim"), unclipped)
    assert unclipped.abs().max() > 1


def test_each_step_is_told_with_its_latents(base: StableDiffusionPipeline) -> None:
    seen: list[tuple[int, int]] = []
    latents: list[Tensor] = []

    def note(done: int, of: int, now: Tensor) -> None:
        seen.append((done, of))
        latents.append(now.clone())

    last = ours(base, on_step=note, num_inference_steps=3, num_images=2)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(latents[-1], last)
    assert not torch.equal(latents[0], latents[1])


class StoppedError(Exception):
    pass


def test_what_on_step_raises_ends_the_drawing(base: StableDiffusionPipeline, adapter: Adapter) -> None:
    steps: list[int] = []

    def stop(done: int, of: int, latents: Tensor) -> None:
        steps.append(done)
        if done == 2:
            raise StoppedError

    before = ours(base)
    with pytest.raises(StoppedError):
        ours(base, adapter, stop, num_inference_steps=50)
    assert steps == [1, 2]
    assert torch.equal(ours(base), before)
