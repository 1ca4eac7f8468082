from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from api.engine.trainer import Examples, Recipe, Trainer, recipe_of, require_trainable
from api.errors import ModelUnavailable
from tests import builders, families

STEPS = 8
TEXT = [0.0, 1e-2]  # rates of the text encoder


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    made = builders.pipeline()
    for module in (made.unet, made.vae, made.text_encoder):
        module.requires_grad_(False)
    return made


def examples(pictures: int, words: str) -> Examples:
    generator = torch.Generator().manual_seed(len(words))
    latents = torch.randn(pictures, 4, 8, 8, generator=generator)
    return Examples(latents, [f"{words} {number}" for number in range(pictures)])


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"steps": STEPS, "rank": 2, "rate": 1e-2, "own": 2, "prior": 1, "seed": 3, **fields})


def trainer(pipeline: StableDiffusionPipeline, **fields: Any) -> Trainer:
    return Trainer(pipeline, examples(3, "photo of sks person"), examples(2, "photo of a person"), recipe(**fields))


def after(one: Trainer, steps: int) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        one.step()
    return learned(one)


def learned(one: Trainer) -> dict[str, torch.Tensor]:
    """What it learned so far, in full, under the names that files have."""
    return {
        name: own.detach().clone()
        for name, own in zip(one.learned.tensors(), one.learned.parameters.values(), strict=True)
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error(one: Trainer) -> float:
    """What it is off on its own pictures, of the same noise each time."""
    with torch.no_grad():
        off = [
            one._losses(one._own.latents, one._own.words, torch.Generator().manual_seed(seed)).mean()
            for seed in range(20)
        ]
    return float(torch.stack(off).mean())


def test_it_learns_its_pictures(pipeline: StableDiffusionPipeline) -> None:
    one = trainer(pipeline, steps=100, prior=0, rank=8)
    before = error(one)
    after(one, 100)
    assert error(one) < 0.95 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text_rate", TEXT)
def test_what_a_base_of_half_precision_teaches_is_kept_in_full(dtype: torch.dtype, text_rate: float) -> None:
    base = builders.pipeline()
    base.unet.to(dtype)
    base.text_encoder.to(dtype)
    one = trainer(base, steps=60, prior=0, rank=8, text_rate=text_rate)
    before = error(one)
    assert all(factor.dtype == torch.float32 for factor in after(one, 60).values())
    assert error(one) < 0.98 * before
    assert next(base.unet.parameters()).dtype == next(base.text_encoder.parameters()).dtype == dtype


def test_the_loss_is_that_of_what_the_base_predicts() -> None:
    """By hand for one picture: velocity, weighted by the noise, which is never nothing."""
    config = {**builders.SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    base = builders.pipeline(scheduler=DDIMScheduler(**config))
    one = trainer(base, own=1, prior=0)
    latents, words = torch.ones(1, 4, 8, 8), ["a person"]
    loss = one._losses(latents, words, torch.Generator().manual_seed(9))
    chance = torch.Generator().manual_seed(9)
    time = int((torch.randperm(1, generator=chance) + torch.rand(1, generator=chance)) * 1000)
    noise = torch.randn(latents.shape, generator=chance)
    kept = one._noise.alphas_cumprod[time]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        texts = base.encode_prompt(words, base.device, 1, do_classifier_free_guidance=False)[0]
        error = (base.unet(noisy, time, texts).sample - velocity).square().mean()
    snr = kept / (1 - kept)
    assert torch.allclose(loss, min(torch.tensor(1.0), 5 / (snr + 1)) * error, rtol=1e-4)
    assert 5 / (one._snr[-1] + 1) >= 1  # pure noise keeps its full weight


def embedded(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    with torch.no_grad():
        texts: torch.Tensor = pipeline.encode_prompt("photo of sks person 1", "cpu", 1, False)[0]
    return texts


@pytest.mark.parametrize("text_rate", TEXT)
def test_the_base_stays_as_it_is(pipeline: StableDiffusionPipeline, text_rate: float) -> None:
    modules, embedding = (pipeline.unet, pipeline.text_encoder), embedded(pipeline)
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    one = trainer(pipeline, text_rate=text_rate)  # it is alive until the end
    after(one, 2)
    for module, values in zip(modules, before, strict=True):
        assert same(module.state_dict(), values)
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(embedded(pipeline), embedding)


def test_the_text_encoder_learns_where_that_is_asked_for(pipeline: StableDiffusionPipeline) -> None:
    """Its attention alone, at a rate of its own, and every text is read with what it learned."""
    one = trainer(pipeline, rate=0.0, text_rate=1e-2)
    words = [*one._own.words, ""]
    before = one._words.read(words, (64, 64)).texts
    learned = {name for name, factor in after(one, STEPS).items() if ".lora_B." in name and factor.any()}
    layers = [f"{layer}_proj" for layer in ("q", "k", "v", "out")]
    of_texts = {f"text_encoder.text_model.encoder.layers.{n}.self_attn.{layer}" for n in (0, 1) for layer in layers}
    assert learned == {f"{layer}.lora_B.weight" for layer in of_texts}
    read = one._words.read(words, (64, 64)).texts
    assert all(not torch.allclose(now, then, atol=1e-5) for now, then in zip(read, before, strict=True))


def test_a_seed_trains_the_same_and_another_does_not(pipeline: StableDiffusionPipeline) -> None:
    first = after(trainer(pipeline), STEPS)
    torch.rand(5)  # what others draw from the common generator changes nothing
    assert same(first, after(trainer(pipeline), STEPS))
    assert not same(first, after(trainer(pipeline, seed=4), STEPS))


@pytest.mark.parametrize("text_rate", TEXT)
@pytest.mark.parametrize("done", [0, 1, 5, STEPS])
def test_it_goes_on_from_a_state_to_the_same_end(
    pipeline: StableDiffusionPipeline, done: int, text_rate: float
) -> None:
    killed = trainer(pipeline, text_rate=text_rate)
    after(killed, done)
    state = killed.state()
    again = trainer(pipeline, text_rate=text_rate)
    again.restore(state)
    assert again.done == done
    assert same(after(again, STEPS - done), after(trainer(pipeline, text_rate=text_rate), STEPS))


@pytest.mark.parametrize("text_rate", TEXT)
def test_over_stable_diffusion_xl_it_learns_and_goes_on_too(text_rate: float) -> None:
    """Some factors of its first encoder are never reached: it is read before its last layer."""
    base = families.sdxl()
    for module in (base.unet, base.vae, base.text_encoder, base.text_encoder_2):
        module.requires_grad_(False)
    killed = trainer(base, guidance=2.0, text_rate=text_rate)
    after(killed, 3)
    again = trainer(base, guidance=2.0, text_rate=text_rate)
    again.restore(killed.state())
    whole = after(trainer(base, guidance=2.0, text_rate=text_rate), STEPS)
    assert same(after(again, STEPS - 3), whole)
    components = {"unet", "text_encoder", "text_encoder_2"} if text_rate else {"unet"}
    assert {name.split(".")[0] for name, one in whole.items() if ".lora_B." in name and one.any()} == components
    assert not any(isinstance(part, BaseTunerLayer) for part in (*base.unet.modules(), *base.text_encoder_2.modules()))


@pytest.mark.parametrize("change", [{"prediction_type": "sample"}, {"prediction_type": "flow_prediction"}])
def test_a_base_of_other_noise_is_refused(pipeline: StableDiffusionPipeline, change: dict[str, str]) -> None:
    base = builders.pipeline(scheduler=DDIMScheduler(**builders.SCHEDULER))
    require_trainable(base)
    base.scheduler.register_to_config(**change)
    with pytest.raises(ModelUnavailable, match="cannot be trained"):
        require_trainable(base)


def test_a_guided_loss_is_another_one(pipeline: StableDiffusionPipeline) -> None:
    assert not same(after(trainer(pipeline), 2), after(trainer(pipeline, guidance=3.0), 2))


def test_a_base_says_how_it_is_trained(pipeline: StableDiffusionPipeline) -> None:
    assert recipe_of(pipeline, steps=None, rank=8, seed=1) == Recipe(800, 8, 1e-4, 1, 1, 1, text_rate=5e-5)
    assert recipe_of(pipeline, text_rate=0.0).text_rate == 0
    scheduler = DDIMScheduler(**builders.SCHEDULER)
    scheduler.register_to_config(_training_steps=50, _training_guidance=3.0, _training_text_rate=1e-3)
    base = builders.pipeline(scheduler=scheduler)
    expected = Recipe(50, 16, 1e-4, 1, 1, 0, guidance=3.0, text_rate=1e-3)
    assert recipe_of(base, steps=None, rank=None, seed=0) == expected


def of(component: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mark = f"{component}."
    return {name.removeprefix(mark): one for name, one in factors.items() if name.startswith(mark)}


@pytest.mark.parametrize("text_rate", TEXT)
def test_what_it_learned_is_named_as_diffusers_names_it(
    pipeline: StableDiffusionPipeline, tmp_path: Path, text_rate: float
) -> None:
    ours = trainer(pipeline, text_rate=text_rate)
    factors = after(ours, 2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=of("unet", factors), text_encoder_lora_layers=of("text_encoder", factors)
    )
    theirs = builders.pipeline()
    theirs.load_lora_weights(tmp_path)
    inputs, words = (torch.ones(1, 4, 8, 8), torch.tensor([500])), ["photo of sks person"]
    with torch.no_grad():
        texts = theirs.encode_prompt(words, "cpu", 1, False)[0]
        expected = theirs.unet(*inputs, texts).sample
        assert torch.allclose(ours._unet(*inputs, ours._words.read(words, (64, 64)).texts).sample, expected, atol=1e-5)
        plain = pipeline.encode_prompt(words, "cpu", 1, False)[0]
        assert not torch.allclose(pipeline.unet(*inputs, plain).sample, expected, atol=1e-5)
    assert torch.allclose(texts, plain, atol=1e-5) is not bool(text_rate)
