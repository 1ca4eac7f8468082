"""All weights of a copy of a base learn: as exactly as factors do, and nothing of the base changes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from api.engine.candidates import save_model
from api.engine.learned import STEP_BYTES, step_bytes
from api.engine.sources import FoundBase
from api.engine.trainer import FULL_RATE, Trainer, recipe_of
from tests import builders, families
from tests.engine.test_trainer import STEPS, TEXT, after, error, same, trainer


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    made = builders.pipeline()
    for module in (made.unet, made.vae, made.text_encoder):
        module.requires_grad_(False)
    return made


def full(pipeline: Any, **fields: Any) -> Trainer:
    return trainer(pipeline, **{"rank": None, "rate": 1e-3, **fields})


def values(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every weight that could learn, by component and name, as files name it."""
    return {
        name: value.clone()
        for name, value in zip(
            full(pipeline, text_rate=1.0).learned.tensors(),
            [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()],
            strict=True,
        )
    }


def test_every_weight_learns_and_the_base_stays_as_it_is(pipeline: StableDiffusionPipeline) -> None:
    before = values(pipeline)
    one = full(pipeline, steps=100, prior=0)
    was = error(one)
    learned = after(one, 100)
    assert error(one) < 0.9 * was
    assert learned.keys() == {name for name in before if name.startswith("unet.")}
    assert {name for name, value in learned.items() if torch.equal(value, before[name])} == set()
    assert same(values(pipeline), before)
    assert not any(one.requires_grad for one in (*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()))


def test_the_words_learn_where_that_is_asked_for(pipeline: StableDiffusionPipeline) -> None:
    before = values(pipeline)
    learned = after(full(pipeline, rate=0.0, text_rate=1e-3), 2)
    assert learned.keys() == before.keys()
    changed = {name for name, value in learned.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"text_encoder"}
    assert "text_encoder.text_model.embeddings.token_embedding.weight" in changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_base_of_half_precision_steps_are_not_lost(dtype: torch.dtype) -> None:
    """At the usual rate a step is less than such a weight can tell from none."""
    base = builders.pipeline()
    base.unet.to(dtype)
    base.text_encoder.to(dtype)
    one = full(base, steps=60, prior=0, text_rate=1e-4)
    before = error(one)
    assert all(value.dtype == torch.float32 for value in after(one, 60).values())
    assert error(one) < 0.95 * before
    small = full(base, rate=FULL_RATE)
    weight = small.learned.parameters["unet.conv_in.weight"]
    was = weight.detach().clone()
    after(small, 2)
    assert (weight != was).float().mean() > 0.9
    assert (weight.to(dtype) != was.to(dtype)).float().mean() < 0.1
    assert next(base.unet.parameters()).dtype == next(base.text_encoder.parameters()).dtype == dtype


@pytest.mark.parametrize("text_rate", TEXT)
@pytest.mark.parametrize("done", [0, 3])
def test_it_goes_on_from_a_state_to_the_same_end(
    pipeline: StableDiffusionPipeline, done: int, text_rate: float
) -> None:
    killed = full(pipeline, text_rate=text_rate)
    after(killed, done)
    again = full(pipeline, text_rate=text_rate)
    again.restore(killed.state())
    assert same(after(again, STEPS - done), after(full(pipeline, text_rate=text_rate), STEPS))


def test_over_stable_diffusion_xl_it_learns_and_goes_on_too() -> None:
    base = families.sdxl()
    for module in (base.unet, base.vae, base.text_encoder, base.text_encoder_2):
        module.requires_grad_(False)
    killed = full(base, guidance=2.0, text_rate=1e-4)
    after(killed, 3)
    again = full(base, guidance=2.0, text_rate=1e-4)
    again.restore(killed.state())
    whole = after(full(base, guidance=2.0, text_rate=1e-4), STEPS)
    assert same(after(again, STEPS - 3), whole)
    assert {name.split(".")[0] for name in whole} == {"unet", "text_encoder", "text_encoder_2"}


def test_what_is_kept_for_the_way_back_may_be_computed_again(pipeline: StableDiffusionPipeline) -> None:
    """As on a GPU, to save its memory: the same is learned."""
    one = full(pipeline)
    one.learned.modules["unet"].enable_gradient_checkpointing()
    assert same(after(one, 2), after(full(pipeline), 2))


def test_a_base_says_how_all_its_weights_are_trained(pipeline: StableDiffusionPipeline) -> None:
    recipe = recipe_of(pipeline, full=True, rank=None, steps=5)
    assert (recipe.rank, recipe.rate, recipe.text_rate, recipe.steps) == (None, FULL_RATE, FULL_RATE / 2, 5)
    base = copy.copy(pipeline)
    base.register_modules(scheduler=copy.deepcopy(pipeline.scheduler))
    said = {"_training_rate": 1e-2, "_training_text_rate": 1e-3, "_training_rank": 4, "_training_own": 3}
    base.scheduler.register_to_config(**said, _training_full_rate=1e-5)
    recipe = recipe_of(base, full=True)
    assert (recipe.rank, recipe.rate, recipe.text_rate, recipe.own) == (None, 1e-5, 5e-6, 3)
    assert recipe_of(base).rank == 4


def test_what_its_steps_take_is_known_before(pipeline: StableDiffusionPipeline) -> None:
    weights = sum(weight.numel() for weight in pipeline.unet.parameters())
    assert step_bytes(pipeline, ["unet"]) == STEP_BYTES * weights == 16 * weights
    one = full(pipeline)
    one.step()
    state = one.state()
    assert sum(tensor.nbytes for name, tensor in state.items() if tensor.dim()) == 12 * weights


@pytest.mark.parametrize("text_rate", TEXT)
def test_its_folder_is_a_whole_model(
    pipeline: StableDiffusionPipeline, base_folder: Path, tmp_path: Path, text_rate: float
) -> None:
    """What learned is in it, in float16, and else the base's own files to the last bit."""
    one = full(pipeline, rate=0.1, text_rate=text_rate)
    after(one, 3)
    for _ in range(2):  # once more over the first
        save_model(FoundBase("base", base_folder), one.learned.tensors(), tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    names = {str(file.relative_to(base_folder)) for file in base_folder.rglob("*") if file.is_file()}
    assert {str(file.relative_to(tmp_path / "whole")) for file in (tmp_path / "whole").rglob("*.*")} == names
    changed = {name for name in names if (tmp_path / "whole" / name).read_bytes() != (base_folder / name).read_bytes()}
    text = {"text_encoder/model.safetensors"} if text_rate else set()
    assert changed == {"unet/diffusion_pytorch_model.safetensors", *text}
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    inputs, words = (torch.ones(1, 4, 8, 8), torch.tensor([500])), ["photo of sks person"]
    with torch.no_grad():
        texts = theirs.encode_prompt(words, "cpu", 1, False)[0]
        ours = one._unet(*inputs, one._words.read(words, (64, 64)).texts).sample
        expected = theirs.unet(*inputs, texts).sample
        plain = pipeline.unet(*inputs, pipeline.encode_prompt(words, "cpu", 1, False)[0]).sample
    assert torch.allclose(ours, expected, atol=5e-3)
    assert not torch.allclose(plain, expected, atol=5e-2)
