import pytest
import torch
from diffusers import StableDiffusionPipeline

from api.engine.adapters import Adapter, LayerDelta, NormDelta, load_adapter
from api.engine.combined import combined, is_made_of
from api.engine.slots import Slots
from tests import builders

ROWS = 3
SIDE = 8


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture(scope="module")
def adapters(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Two of different ranks that share some layers, one in kohya's style with an alpha."""
    folder = tmp_path_factory.mktemp("parts")
    text = builders.factors(pipeline.text_encoder, builders.TEXT_LAYERS)
    one = builders.factors(pipeline.unet, builders.UNET_LAYERS, rank=3, seed=1)
    other = builders.factors(pipeline.unet, (builders.LINEAR, builders.CONV), rank=5, seed=2)
    files = [
        builders.diffusers_lora(folder / "one.safetensors", one, text),
        builders.kohya_lora(folder / "other.safetensors", other, {}, alpha=2.0),
    ]
    return [load_adapter(file, pipeline, 1.0) for file in files]


def said(slots: Slots, adapter: Adapter) -> torch.Tensor:
    slot = slots.acquire(adapter)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(ROWS, 4, SIDE, SIDE, generator=generator)
    text = torch.randn(ROWS, 5, 16, generator=generator)
    try:
        with torch.inference_mode():
            return slots.predict([slot] * ROWS, latents, torch.full((ROWS,), 500), text)
    finally:
        slots.release(slot)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_a_combination_changes_a_base_as_its_parts_do(
    pipeline: StableDiffusionPipeline, adapters: list[Adapter], weights: tuple[float, float]
) -> None:
    both = combined(list(zip(adapters, weights, strict=True)))
    for name, layer in pipeline.unet.named_modules():
        if (delta := both.of("unet").get(name)) is None:
            continue
        expected = layer.weight.clone()
        for adapter, weight in zip(adapters, weights, strict=True):
            if isinstance(part := adapter.of("unet").get(name), LayerDelta):
                expected += weight * (part.merged(layer.weight) - layer.weight)
        assert torch.allclose(delta.parameters(layer)["weight"], expected, atol=1e-5)
    assert both.of("unet").keys() == adapters[0].of("unet").keys() | adapters[1].of("unet").keys()
    assert both.of("text_encoder").keys() == adapters[0].of("text_encoder").keys()


def test_it_rides_in_a_slot_beside_its_parts(pipeline: StableDiffusionPipeline, adapters: list[Adapter]) -> None:
    slots = Slots(pipeline.unet, "unet", count=4)
    both = combined([(adapter, 1.0) for adapter in adapters])
    alone = said(Slots(pipeline.unet, "unet", count=1), both)
    apart = [said(slots, adapter) for adapter in adapters]
    together = said(slots, both)
    assert torch.allclose(together, alone, atol=1e-5)
    assert all(not torch.allclose(together, one, atol=1e-2) for one in apart)
    slots.check()


def test_the_same_parts_are_the_same_adapter(pipeline: StableDiffusionPipeline, adapters: list[Adapter]) -> None:
    slots = Slots(pipeline.unet, "unet", count=4)
    pairs = [(adapters[0], 1.0), (adapters[1], 0.5)]
    for parts in (pairs, pairs, [(adapters[0], 1.0), (adapters[1], 0.6)]):
        said(slots, combined(parts))
    assert len(slots.warm()) == 2


def test_a_combination_leaves_with_each_of_its_parts(
    pipeline: StableDiffusionPipeline, adapters: list[Adapter]
) -> None:
    both = combined([(adapter, 1.0) for adapter in adapters])
    for adapter in adapters:
        assert is_made_of(both.key, adapter.key)
        slots = Slots(pipeline.unet, "unet", count=4)
        said(slots, both)
        slots.drop(adapter)
        assert slots.warm() == []
        slots.check()
    assert not is_made_of(adapters[0].key, adapters[1].key)


def test_biases_and_norms_add_up(pipeline: StableDiffusionPipeline) -> None:
    norm, layer = "mid_block.attentions.0.norm", builders.LINEAR
    ones, bias = torch.ones(16), torch.arange(8.0)
    none = (torch.zeros(0, 8), torch.zeros(8, 0))
    parts = [
        Adapter((NormDelta("unet", norm, ones, 2 * ones), LayerDelta("unet", layer, *none, 1.0, bias))),
        Adapter((NormDelta("unet", norm, ones, -ones), LayerDelta("unet", layer, *none, 1.0, bias))),
    ]
    both = combined([(parts[0], 1.0), (parts[1], 0.5)]).of("unet")
    changed, linear = both[norm], both[layer]
    assert isinstance(changed, NormDelta)
    assert isinstance(linear, LayerDelta)
    assert torch.equal(changed.weight, 1.5 * ones)
    assert torch.equal(changed.bias, 1.5 * ones)
    assert linear.bias is not None
    assert torch.equal(linear.bias, 1.5 * bias)
