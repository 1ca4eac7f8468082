from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from api.engine.trainer import Examples, Recipe, Trainer, recipe_of
from tests import builders

STEPS = 8


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    made = builders.pipeline()
    for module in (made.unet, made.vae, made.text_encoder):
        module.requires_grad_(False)
    return made


def examples(pictures: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        torch.randn(pictures, 4, 8, 8, generator=generator), torch.randn(pictures, 5, 16, generator=generator)
    )


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"steps": STEPS, "rank": 2, "rate": 1e-2, "own": 2, "prior": 1, "seed": 3, **fields})


def trainer(pipeline: StableDiffusionPipeline, **fields: Any) -> Trainer:
    return Trainer(pipeline, examples(3, 1), examples(2, 2), torch.zeros(1, 5, 16), recipe(**fields))


def after(one: Trainer, steps: int) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        one.step()
    return one.factors()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error(one: Trainer) -> float:
    """What it is off on its own pictures, of the same noise each time."""
    with torch.no_grad():
        off = [
            one._losses(one._own.latents, one._own.texts, torch.Generator().manual_seed(seed)).mean()
            for seed in range(20)
        ]
    return float(torch.stack(off).mean())


def test_it_learns_its_pictures(pipeline: StableDiffusionPipeline) -> None:
    one = trainer(pipeline, steps=100, prior=0, rank=8)
    before = error(one)
    after(one, 100)
    assert error(one) < 0.95 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_base_of_half_precision_teaches_is_kept_in_full(dtype: torch.dtype) -> None:
    base = builders.pipeline()
    base.unet.to(dtype)
    one = trainer(base, steps=60, prior=0, rank=8)
    before = error(one)
    assert all(factor.dtype == torch.float32 for factor in after(one, 60).values())
    assert error(one) < 0.98 * before
    assert next(base.unet.parameters()).dtype == dtype


def test_the_loss_is_that_of_what_the_base_predicts() -> None:
    """By hand for one picture: velocity, weighted by the noise, which is never nothing."""
    config = {**builders.SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    base = builders.pipeline(scheduler=DDIMScheduler(**config))
    one = trainer(base, own=1, prior=0)
    latents, texts = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 16)
    loss = one._losses(latents, texts, torch.Generator().manual_seed(9))
    chance = torch.Generator().manual_seed(9)
    time = int((torch.randperm(1, generator=chance) + torch.rand(1, generator=chance)) * 1000)
    noise = torch.randn(latents.shape, generator=chance)
    kept = one._noise.alphas_cumprod[time]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        error = (base.unet(noisy, time, texts).sample - velocity).square().mean()
    snr = kept / (1 - kept)
    assert torch.allclose(loss, min(torch.tensor(1.0), 5 / (snr + 1)) * error, rtol=1e-4)
    assert 5 / (one._snr[-1] + 1) >= 1  # pure noise keeps its full weight


def test_the_base_stays_as_it_is(pipeline: StableDiffusionPipeline) -> None:
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    after(trainer(pipeline), 2)
    assert pipeline.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_a_seed_trains_the_same_and_another_does_not(pipeline: StableDiffusionPipeline) -> None:
    first = after(trainer(pipeline), STEPS)
    torch.rand(5)  # what others draw from the common generator changes nothing
    assert same(first, after(trainer(pipeline), STEPS))
    assert not same(first, after(trainer(pipeline, seed=4), STEPS))


@pytest.mark.parametrize("done", [0, 1, 5, STEPS])
def test_it_goes_on_from_a_state_to_the_same_end(pipeline: StableDiffusionPipeline, done: int) -> None:
    killed = trainer(pipeline)
    after(killed, done)
    state = killed.state()
    again = trainer(pipeline)
    again.restore(state)
    assert again.done == done
    assert same(after(again, STEPS - done), after(trainer(pipeline), STEPS))


def test_a_guided_loss_is_another_one(pipeline: StableDiffusionPipeline) -> None:
    assert not same(after(trainer(pipeline), 2), after(trainer(pipeline, guidance=3.0), 2))


def test_a_base_says_how_it_is_trained(pipeline: StableDiffusionPipeline) -> None:
    assert recipe_of(pipeline, steps=None, rank=8, seed=1) == Recipe(800, 8, 1e-4, 1, 1, 1)
    scheduler = DDIMScheduler(**builders.SCHEDULER)
    scheduler.register_to_config(_training_steps=50, _training_guidance=3.0)
    base = builders.pipeline(scheduler=scheduler)
    assert recipe_of(base, steps=None, rank=None, seed=0) == Recipe(50, 16, 1e-4, 1, 1, 0, guidance=3.0)


def test_what_it_learned_is_named_as_diffusers_names_it(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers={name.removeprefix("unet."): one for name, one in after(trainer(pipeline), 2).items()},
    )
    theirs = builders.pipeline()
    theirs.load_lora_weights(tmp_path)
    ours = trainer(pipeline)
    after(ours, 2)
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 5, 16))
    with torch.no_grad():
        expected = theirs.unet(*inputs).sample
        assert torch.allclose(ours._unet(*inputs).sample, expected, atol=1e-5)
        assert not torch.allclose(pipeline.unet(*inputs).sample, expected, atol=1e-5)
