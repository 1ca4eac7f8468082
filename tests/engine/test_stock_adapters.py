"""A LoRA over any other pipeline is checked, and loaded beside its base, which stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from api.engine.components import Placement, load_stock
from api.engine.sources import FoundBase
from api.engine.stock_adapters import load_stock_adapter
from api.engine.weights import TensorPool
from api.errors import ModelUnavailable
from tests import families
from tests.builders import Tensors

FamilyFolder = Callable[[str], Path]


@pytest.fixture
def flux(family_folder: FamilyFolder) -> DiffusionPipeline:
    found = FoundBase("flux", family_folder("flux"))
    return load_stock(found, Placement("cpu", torch.float32, torch.float32), TensorPool())


def weights(pipeline: DiffusionPipeline) -> Tensors:
    return {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}


def test_parts_without_weights_are_the_bases_own(
    flux: DiffusionPipeline, family_folder: FamilyFolder, tmp_path: Path
) -> None:
    # Qwen-Image's remember what they computed as long as the process lives.
    file = families.lora(tmp_path / "ada.safetensors", family_folder("flux"))
    copy = load_stock_adapter(file, flux, 1.0).modules["transformer"]
    assert copy.get_submodule("pos_embed") is flux.transformer.pos_embed
    assert copy is not flux.transformer


LAYER = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
Change = Callable[[Tensors], Any]
WRONG: dict[str, tuple[Change, str]] = {
    "DoRA": (lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}), "is a DoRA"),
    "whole weights": (lambda t: t.update({"transformer.norm_out.linear.weight": torch.ones(64, 32)}), "not a plain"),
    "LoKr": (lambda t: t.update({f"{LAYER}.lokr_w1": torch.ones(2, 2)}), "not a plain"),
    "B alone": (lambda t: t.pop(A), "one of the two factors"),
    "A alone": (lambda t: t.pop(B), "one of the two factors"),
    "unknown layer": (lambda t: t.update({key.replace(".0.", ".9."): t[key].clone() for key in (A, B)}), r"\.9\."),
    "another width": (lambda t: t.update({B: torch.ones(31, 2)}), "does not load"),
    "wider input": (
        lambda t: t.update(
            {
                "transformer.x_embedder.lora_A.weight": torch.ones(2, 32),
                "transformer.x_embedder.lora_B.weight": torch.ones(32, 2),
            }
        ),
        "x_embedder has another shape",
    ),
    "not finite": (lambda t: t[B].fill_(float("nan")), "not finite"),
    "of nothing here": (lambda t: [t.update({f"unet.{key}": t.pop(key)}) for key in list(t)], "changes nothing"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_no_lora_for_this_base_is_refused_and_leaves_it_as_it_was(
    flux: DiffusionPipeline, family_folder: FamilyFolder, tmp_path: Path, change: Change, reason: str
) -> None:
    tensors = load_file(families.lora(tmp_path / "lora.safetensors", family_folder("flux"), text=False))
    change(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors")
    before, layers = weights(flux), [id(layer) for layer in flux.transformer.modules()]
    with pytest.raises(ModelUnavailable, match=reason):
        load_stock_adapter(tmp_path / "wrong.safetensors", flux, 1.0)
    assert [id(layer) for layer in flux.transformer.modules()] == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in flux.transformer.state_dict().items())
    assert not hasattr(flux.transformer, "peft_config")


def test_metadata_cannot_change_the_base(flux: DiffusionPipeline, family_folder: FamilyFolder, tmp_path: Path) -> None:
    """PiSSA's initialisation takes its factors out of the base's own weights."""
    file = families.lora(tmp_path / "lora.safetensors", family_folder("flux"), text=False)
    config = {"transformer.init_lora_weights": "pissa", "transformer.r": 2, "transformer.target_modules": "(x+x+)+y"}
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    before = weights(flux)
    load_stock_adapter(file, flux, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flux.transformer.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"PK\x03\x04"], ids=["empty", "pickle", "zip"])
def test_what_is_no_safetensors_file_is_refused(flux: DiffusionPipeline, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(ModelUnavailable, match="not a safetensors file"):
        load_stock_adapter(tmp_path / "lora.safetensors", flux, 1.0)
