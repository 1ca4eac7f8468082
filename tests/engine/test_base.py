from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from api.engine.adapters import Adapter, LayerDelta
from api.engine.base import Base
from api.engine.weights import storages_of, tensors_of
from tests import builders


def adapter(base: Base) -> Adapter:
    deltas = []
    parts = (("unet", builders.UNET_LAYERS), ("text_encoder", builders.TEXT_LAYERS))
    for component, layers in parts:
        pairs = builders.factors(getattr(base.pipeline, component), layers)
        deltas += [LayerDelta(component, name, pair["A"], pair["B"], 1.0) for name, pair in pairs.items()]
    return Adapter(tuple(deltas))


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({}, True),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, True),
        ({"time_cond_proj_dim": 8}, False),
        ({"class_embed_type": "timestep"}, False),
        ({"addition_embed_type": "image", "encoder_hid_dim": 16}, False),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}, False),
    ],
    ids=str,
)
def test_a_unet_that_asks_for_more_does_not_fit_the_batch(config: dict[str, Any], fits: bool) -> None:
    pipeline = builders.pipeline()
    pipeline.register_modules(unet=UNet2DConditionModel(**builders.UNET, **config))
    assert Base(pipeline, 1).fits_the_batch is fits


def test_a_unet_of_another_kind_does_not_fit_the_batch() -> None:
    pipeline = builders.pipeline()
    other = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    pipeline.register_modules(unet=other)
    assert not Base(pipeline, 1).fits_the_batch


def test_its_copies_cost_no_weights() -> None:
    pipeline = builders.pipeline()
    base = Base(pipeline, 4)
    for copied, original in ((base.unet.module, pipeline.unet), (base.texts._slots.module, pipeline.text_encoder)):
        assert copied is not original
        assert storages_of(tensors_of(copied)) == storages_of(tensors_of(original))


def test_dropping_an_adapter_erases_every_copy_of_it() -> None:
    base = Base(builders.pipeline(), 2)
    ada = adapter(base)
    base.texts.encode("sks person", ada)
    base.unet.release(base.unet.acquire(ada))
    assert base.unet.warm() == base.texts._slots.warm() == [ada.key]
    base.drop(ada)
    assert base.unet.warm() == base.texts._slots.warm() == []
    assert not base.texts._known
    factors = [
        factor
        for slots in (base.unet, base.texts._slots)
        for table in slots._tables.values()
        for factor in table.tensors()
    ]
    assert len(factors) == 2 * len(ada.deltas)
    assert not any(factor.any() for factor in factors)
    base.drop(ada)  # again, and nothing happens


def test_the_pipeline_is_never_written_to() -> None:
    pipeline = builders.pipeline()
    parts = (pipeline.unet, pipeline.text_encoder)
    modules = [module for part in parts for module in part.modules()]
    inside = [(dict(module._modules), dict(module._parameters), dict(module._buffers)) for module in modules]
    values = [value.clone() for part in parts for value in tensors_of(part)]
    base = Base(pipeline, 2)
    ada = adapter(base)
    base.texts.encode("sks person", ada)
    with base.unet.rows([base.unet.acquire(ada)]), torch.inference_mode():
        base.unet.module(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 7, 16))
    assert [module for part in parts for module in part.modules()] == modules
    assert inside == [(module._modules, module._parameters, module._buffers) for module in modules]
    after = [value for part in parts for value in tensors_of(part)]
    assert all(torch.equal(one, other) for one, other in zip(values, after, strict=True))
