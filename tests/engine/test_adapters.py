"""Adapters draw as diffusers' and peft's own readers of the same files do."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from api.engine.adapters import Adapter, LayerDelta, find_adapter_file, load_adapter, merged
from api.engine.weights import storages_of
from api.errors import ModelUnavailable
from tests import builders
from tests.builders import CONV, LINEAR, OUT, POINTWISE, TEXT_LAYERS, UNET_LAYERS, Factors

# Merging W + BA rounds otherwise than adding B(Ax) to Wx does: both in float32, outputs of size 1 and 10.
ATOL, RTOL = 1e-5, 1e-4
LAYERS = {"unet": UNET_LAYERS, "text_encoder": TEXT_LAYERS}
Outputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture(scope="module")
def unet(base: StableDiffusionPipeline) -> Factors:
    return builders.factors(base.unet, UNET_LAYERS)


@pytest.fixture(scope="module")
def text(base: StableDiffusionPipeline) -> Factors:
    return builders.factors(base.text_encoder, TEXT_LAYERS)


@torch.inference_mode()
def outputs(pipeline: StableDiffusionPipeline) -> Outputs:
    """What the text encoder makes of a prompt, and the UNet of that."""
    ids = pipeline.tokenizer("sks person", return_tensors="pt", padding="max_length", truncation=True).input_ids
    words = pipeline.text_encoder(ids)[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return words, pipeline.unet(noise, 10, words).sample


def ours(base: StableDiffusionPipeline, path: Path, strength: float = 1.0) -> Outputs:
    return outputs(builders.with_merged(base, load_adapter(find_adapter_file(path), base, strength)))


def by_diffusers(file: Path, strength: float = 1.0) -> Outputs:
    pipeline = builders.pipeline()
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="mine")
    pipeline.set_adapters("mine", strength)
    return outputs(pipeline)


def is_close(some: Outputs, other: Outputs) -> tuple[bool, bool]:
    words, noise = (torch.allclose(one, two, RTOL, ATOL) for one, two in zip(some, other, strict=True))
    return words, noise


METADATA = {
    f"{component}.{name}": value
    for component, alpha in (("unet", 4), ("text_encoder", 1))
    for name, value in {"r": 2, "lora_alpha": alpha, "target_modules": list(LAYERS[component])}.items()
}
Writer = Callable[[Path, Factors, Factors], Path]
WRITERS: dict[str, Writer] = {
    "diffusers": builders.diffusers_lora,
    "diffusers, alpha in its metadata": partial(builders.diffusers_lora, config=METADATA),
    "diffusers, alphas by layer and rank-stabilized": partial(
        builders.diffusers_lora,
        config=METADATA | {"unet.alpha_pattern": {LINEAR: 7, CONV: 3}, "unet.use_rslora": True},
    ),
    "diffusers before peft": builders.old_diffusers_lora,
    "kohya": builders.kohya_lora,
    "kohya with alphas": partial(builders.kohya_lora, alpha=0.5),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_every_style_draws_as_diffusers_does(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, text: Factors, write: Writer, strength: float
) -> None:
    file = write(tmp_path / "lora.safetensors", unet, text)
    drawn = ours(base, file, strength)
    assert is_close(drawn, by_diffusers(file, strength)) == (True, True)
    assert is_close(drawn, outputs(base)) == (False, False)


def test_the_oldest_style_draws_as_diffusers_does(tmp_path: Path, base: StableDiffusionPipeline, unet: Factors) -> None:
    attention = {name: unet[name] for name in (LINEAR, OUT)}
    file = builders.oldest_diffusers_lora(tmp_path / "lora.safetensors", attention)
    assert is_close(ours(base, file), by_diffusers(file)) == (True, True)
    assert is_close(ours(base, file), outputs(base)) == (True, False)


PEFT = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "rank-stabilized": {"lora_alpha": 3, "use_rslora": True},
    "alphas by layer": {"alpha_pattern": {"attn1.to_q": 9, "conv1": 1}},
    "alphas by the end of names that other names end in": {"alpha_pattern": {"proj": 20}},
    "ranks by layer": {"lora_alpha": 3, "rank_pattern": {"attn1.to_q": 4}},
}
TARGETS = ("attn1.to_q", "attn2.to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.0.proj")


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT)
def test_peft_draws_as_peft_does(tmp_path: Path, base: StableDiffusionPipeline, config: dict[str, Any]) -> None:
    theirs = builders.pipeline()
    folder = builders.peft_lora(tmp_path / "lora", theirs.unet, TARGETS, **config)
    drawn = ours(base, folder)
    assert is_close(drawn, outputs(theirs)) == (True, True)
    assert is_close(drawn, outputs(base)) == (True, False)


def test_a_part_of_the_base_may_be_changed_alone(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, text: Factors
) -> None:
    plain = outputs(base)
    only_unet = builders.diffusers_lora(tmp_path / "unet.safetensors", unet, {})
    assert is_close(ours(base, only_unet), plain) == (True, False)
    only_text = builders.diffusers_lora(tmp_path / "text.safetensors", {}, text)
    assert is_close(ours(base, only_text), plain) == (False, False)


@pytest.mark.parametrize("layer", UNET_LAYERS)
def test_the_merged_weight_is_w_plus_scale_b_a(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, layer: str
) -> None:
    file = builders.kohya_lora(tmp_path / "lora.safetensors", {layer: unet[layer]}, {}, alpha=1.0)
    weight, up, down = base.unet.get_submodule(layer).weight, unet[layer]["B"], unet[layer]["A"]
    expected = weight + 0.7 * (1.0 / 2) * torch.einsum("or...,ri...->oi...", up, down)
    changed = merged(base.unet, load_adapter(file, base, 0.7), "unet")
    assert torch.allclose(changed.get_submodule(layer).weight, expected, atol=1e-6)


def test_strength_scales_the_change_and_zero_is_none(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors
) -> None:
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", unet, {})
    deltas = load_adapter(file, base, -0.5).deltas
    assert [delta.scale for delta in deltas if isinstance(delta, LayerDelta)] == [-0.5] * 4
    assert all(torch.equal(one, two) for one, two in zip(ours(base, file, 0.0), outputs(base), strict=True))


def parameters(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder))
    return {f"{name}.{key}": value for name, part in parts for key, value in part.named_parameters()}


@pytest.fixture
def adapter(tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, text: Factors) -> Adapter:
    return load_adapter(builders.diffusers_lora(tmp_path / "lora.safetensors", unet, text), base, 1.0)


def test_the_copy_shares_all_but_the_changed_weights_with_its_base(
    base: StableDiffusionPipeline, adapter: Adapter
) -> None:
    before, copy = parameters(base), parameters(builders.with_merged(base, adapter))
    changed = {f"unet.{name}.weight" for name in UNET_LAYERS} | {f"text_encoder.{name}.weight" for name in TEXT_LAYERS}
    assert {name for name in before if before[name] is not copy[name]} == changed
    assert before.keys() == copy.keys()
    added = set(storages_of(iter(copy.values()))) - set(storages_of(iter(before.values())))
    assert len(added) == len(changed)


def test_the_base_is_never_written_to(base: StableDiffusionPipeline, adapter: Adapter) -> None:
    before, drawn = parameters(base), outputs(base)
    values = {name: value.clone() for name, value in before.items()}
    modules = [*base.unet.named_modules(), *base.text_encoder.named_modules()]
    own = builders.with_merged(base, adapter)
    outputs(own)
    own.unet.conv_in = torch.nn.Identity()  # what becomes of the copy is no matter to the base
    after = parameters(base)
    assert {name for name in before if before[name] is not after.get(name)} == set()
    assert {name for name in before if not torch.equal(values[name], after[name])} == set()
    assert [*base.unet.named_modules(), *base.text_encoder.named_modules()] == modules
    assert all(torch.equal(one, two) for one, two in zip(outputs(base), drawn, strict=True))


def test_the_base_is_not_written_to_when_merging_fails(base: StableDiffusionPipeline, adapter: Adapter) -> None:
    before = parameters(base)
    values = {name: value.clone() for name, value in before.items()}
    lost = LayerDelta("unet", "no.such.layer", torch.ones(1), torch.ones(1), 1.0)
    with pytest.raises(AttributeError):
        merged(base.unet, Adapter((*adapter.deltas[:3], lost)), "unet")
    assert all(one is two for one, two in zip(before.values(), parameters(base).values(), strict=True))
    assert all(torch.equal(values[name], value) for name, value in parameters(base).items())


def test_a_load_on_another_thread_does_not_reach_the_weights(base: StableDiffusionPipeline, adapter: Adapter) -> None:
    expected = outputs(builders.with_merged(base, adapter))
    # While it loads a model, accelerate has every module that is given a parameter put it on "meta".
    with init_empty_weights():
        own = builders.with_merged(base, adapter)
    places = {parameter.device.type for pipeline in (base, own) for parameter in parameters(pipeline).values()}
    assert places == {"cpu"}
    assert all(torch.equal(one, two) for one, two in zip(outputs(own), expected, strict=True))


def test_what_changes_other_parts_changes_nothing_here(base: StableDiffusionPipeline, adapter: Adapter) -> None:
    only_text = Adapter(tuple(delta for delta in adapter.deltas if delta.component == "text_encoder"))
    before, copy = dict(base.unet.named_parameters()), dict(merged(base.unet, only_text, "unet").named_parameters())
    assert {name for name in before if before[name] is not copy[name]} == set()
    assert before.keys() == copy.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_keeps_the_precision_of_the_base(dtype: torch.dtype, unet: Factors, tmp_path: Path) -> None:
    half = builders.pipeline().to(dtype)
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", unet, {})
    changed = merged(half.unet, load_adapter(file, half, 1.0), "unet")
    assert {parameter.dtype for parameter in changed.parameters()} == {dtype}


def test_every_load_of_a_file_has_a_key_of_its_own(tmp_path: Path, base: StableDiffusionPipeline) -> None:
    """Else what was kept of a file that has changed since would be taken for the new one."""
    factors = builders.factors(base.unet, (LINEAR,))
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", factors, {})
    one, other = (load_adapter(file, base, 1.0) for _ in range(2))
    assert one.key != other.key


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "x.safetensors"])
def test_the_file_in_a_folder_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_adapter_file(tmp_path) == tmp_path / name
    assert find_adapter_file(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize(
    ("files", "message"),
    [(["a.safetensors", "b.safetensors"], "has no pytorch_lora_weights"), (["pytorch_lora_weights.bin"], "has no")],
)
def test_a_folder_without_one_adapter_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelUnavailable, match=message):
        find_adapter_file(tmp_path)


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="the adapter nobody is not there"):
        find_adapter_file(tmp_path / "nobody")


DOWN, UP = f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"
CONV_UP = f"unet.{CONV}.lora_B.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "one factor": (lambda t: t.pop(UP), f"one of the two factors of {LINEAR}"),
    "ranks differ": (lambda t: t.update({UP: torch.ones(8, 3)}), LINEAR),
    "rank 0": (lambda t: t.update({UP: torch.ones(8, 0), DOWN: torch.ones(0, 8)}), LINEAR),
    "another base": (lambda t: t.update({DOWN: torch.ones(2, 320)}), rf"{LINEAR} is \(8, 2\) @ \(2, 320\).*\(8, 8\)"),
    "a number for a factor": (lambda t: t.update({DOWN: torch.tensor(1.0)}), LINEAR),
    "an empty factor": (lambda t: t.update({UP: torch.ones(0)}), LINEAR),
    "a 3×3 convolution for B": (lambda t: t.update({CONV_UP: torch.ones(16, 2, 3, 3)}), CONV),
    "unknown layer": (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.ones(1)}), "unet.nowhere.lora_A.weight"),
    "unknown part": (lambda t: t.update({"vae.conv_in.lora_A.weight": torch.ones(1)}), "vae.conv_in.lora_A.weight"),
    "unknown role": (lambda t: t.update({f"unet.{LINEAR}.hada_w1_a": torch.ones(1)}), f"{LINEAR}.hada_w1_a"),
    "not a LoRA": (lambda t: t.update({"weight": torch.ones(1)}), "key weight"),
    "DoRA": (lambda t: t.update({f"unet.{LINEAR}.lora_magnitude_vector": torch.ones(8)}), "DoRA"),
    "kohya's DoRA": (lambda t: t.update({"lora_unet_mid_block.dora_scale": torch.ones(8)}), "DoRA"),
    "NaN": (lambda t: t[DOWN].__setitem__((0, 0), float("nan")), f"{LINEAR} has values that are not finite"),
    "infinity": (lambda t: t[UP].__setitem__((0, 0), float("-inf")), f"{LINEAR} has values that are not finite"),
    "alpha NaN": (lambda t: t.update({f"unet.{LINEAR}.alpha": torch.tensor(float("nan"))}), f"{LINEAR} has an alpha"),
    "two alphas": (lambda t: t.update({f"unet.{LINEAR}.alpha": torch.ones(2)}), f"{LINEAR} has an alpha"),
    "empty": (lambda t: t.clear(), "broken.safetensors holds no LoRA weights"),
    "8-bit factors": (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), "broken.safetensors"),
}


@pytest.mark.parametrize(("change", "culprit"), BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, change: Change, culprit: str
) -> None:
    file = builders.diffusers_lora(tmp_path / "whole.safetensors", unet, {})
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ModelUnavailable, match=culprit):
        load_adapter(tmp_path / "broken.safetensors", base, 1.0)


BAD_SETTINGS = {
    "not JSON": ("{", "adapter_model.safetensors cannot be read"),
    "a list": ("[]", "cannot be read"),
    "alpha is text": ('{"lora_alpha": "much"}', "cannot be read"),
    "alpha is null": ('{"lora_alpha": null}', "cannot be read"),
    "alpha is infinite": ('{"lora_alpha": Infinity}', "alpha that is not finite"),
    "patterns are a list": ('{"alpha_pattern": ["to_q"]}', "cannot be read"),
    "a regular expression": ('{"alpha_pattern": {"(a+)+$": 1}}', "alpha_pattern"),
    "DoRA": ('{"use_dora": true}', "DoRA"),
}


@pytest.mark.parametrize(("content", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_of_peft_are_refused(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, content: str, message: str
) -> None:
    file = builders.diffusers_lora(tmp_path / "adapter_model.safetensors", unet, {})
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelUnavailable, match=message):
        load_adapter(file, base, 1.0)


def test_bad_settings_of_diffusers_are_refused(tmp_path: Path, base: StableDiffusionPipeline, unet: Factors) -> None:
    file = tmp_path / "lora.safetensors"
    builders.diffusers_lora(file, unet, {})
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(["unet"])})
    with pytest.raises(ModelUnavailable, match="settings of the adapter"):
        load_adapter(file, base, 1.0)


@pytest.mark.parametrize("entry", [{"dtype": "XX"}, {"shape": [3, 3]}, {"data_offsets": [0, 4]}], ids=str)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors, entry: dict[str, Any]
) -> None:
    file = builders.diffusers_lora(tmp_path / "lora.safetensors", {LINEAR: unet[LINEAR]}, {})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[DOWN].update(entry)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelUnavailable, match=r"the adapter lora\.safetensors does not load"):
        load_adapter(file, base, 1.0)


def test_pointwise_convolutions_may_be_stored_as_matrices(
    tmp_path: Path, base: StableDiffusionPipeline, unet: Factors
) -> None:
    squeezed = {POINTWISE: {role: factor[:, :, 0, 0].clone() for role, factor in unet[POINTWISE].items()}}
    flat = builders.kohya_lora(tmp_path / "flat.safetensors", squeezed, {})
    whole = builders.kohya_lora(tmp_path / "whole.safetensors", {POINTWISE: unet[POINTWISE]}, {})
    assert torch.equal(ours(base, flat)[1], ours(base, whole)[1])


NORM = "down_blocks.0.resnets.0.norm1"
LAYER_NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"


@pytest.mark.parametrize("endings", [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_norms_and_biases_may_be_changed_too(
    tmp_path: Path, base: StableDiffusionPipeline, endings: tuple[str, str]
) -> None:
    weight, bias = endings
    change, wide = torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 16)
    file = tmp_path / "lora.safetensors"
    tensors = {f"unet.{NORM}.{weight}": change, f"unet.{LAYER_NORM}.{bias}": change, f"unet.{CONV}.diff_b": wide}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    adapter = load_adapter(file, base, 0.5)
    assert not adapter.of_checkpoint
    changed = merged(base.unet, adapter, "unet")
    for name, parameter, by in ((NORM, "weight", change), (LAYER_NORM, "bias", change), (CONV, "bias", wide)):
        before, after = (getattr(unet.get_submodule(name), parameter) for unet in (base.unet, changed))
        torch.testing.assert_close(after, before + 0.5 * by)
    assert changed.get_submodule(CONV).weight is not None
    torch.testing.assert_close(changed.get_submodule(CONV).weight, base.unet.get_submodule(CONV).weight)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (f"unet.{NORM}.diff", (9,), "the base has one of"),
        (f"unet.{LINEAR}.diff_b", (8,), "the base has none"),  # attention's projections have no bias
        (f"unet.{LINEAR}.diff", (8, 8), "not two factors"),
        (f"unet.{NORM}.lora_A.weight", (2, 8), "the base's is a norm"),
    ],
)
def test_changes_that_the_base_has_no_place_for_are_refused(
    tmp_path: Path, base: StableDiffusionPipeline, key: str, shape: tuple[int, ...], message: str
) -> None:
    save_file({key: torch.ones(shape)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelUnavailable, match=message):
        load_adapter(tmp_path / "lora.safetensors", base, 1.0)


def test_a_change_that_is_not_finite_is_refused(tmp_path: Path, base: StableDiffusionPipeline) -> None:
    save_file({f"unet.{NORM}.diff": torch.full((8,), torch.nan)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelUnavailable, match="not finite"):
        load_adapter(tmp_path / "lora.safetensors", base, 1.0)
