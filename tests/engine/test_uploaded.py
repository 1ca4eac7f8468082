"""What is sent is taken if the server's own loaders take it, and nothing else."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from api.engine.adapters import load_adapter
from api.engine.checkup import Checked
from api.engine.components import Placement, load_pipeline
from api.engine.skeleton import Skeleton
from api.engine.sources import FoundBase
from api.engine.uploaded import examine
from api.engine.weights import MAX_HEADER_BYTES, TensorPool
from api.errors import InvalidRequest, ModelUnavailable
from tests import builders, families
from tests.builders import CONV, LINEAR, OUT, TEXT_LAYERS, UNET_LAYERS, Factors, Tensors

CPU = Placement("cpu", torch.float32, torch.float32)
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
LAYERS = len(UNET_LAYERS) + len(TEXT_LAYERS)


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Skeleton:
    return Skeleton.of(FoundBase("base", base_folder))


@pytest.fixture(scope="module")
def unet() -> Factors:
    return builders.factors(builders.pipeline().unet, UNET_LAYERS)


@pytest.fixture(scope="module")
def text() -> Factors:
    return builders.factors(builders.pipeline().text_encoder, TEXT_LAYERS)


@pytest.fixture
def lora(tmp_path: Path, unet: Factors, text: Factors) -> Path:
    """A good one, to be broken."""
    return builders.kohya_lora(tmp_path / "lora.safetensors", unet, text, alpha=1.0)


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A good model, to be broken."""
    return builders.copy_of(base_folder, tmp_path / "model")


def edit(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Writer = Callable[[Path, Factors, Factors], Path]
WRITERS: dict[str, Writer] = {
    "diffusers": builders.diffusers_lora,
    "diffusers before peft": builders.old_diffusers_lora,
    "kohya": builders.kohya_lora,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_lora_of_each_style_is_taken(
    tmp_path: Path, base: Skeleton, unet: Factors, text: Factors, write: Writer
) -> None:
    file = write(tmp_path / "lora.safetensors", unet, text)
    assert examine(file, base) == Checked("lora", rank=2, layers=LAYERS, bytes=file.stat().st_size)
    assert load_adapter(file, builders.pipeline(), 1.0).deltas


def test_the_oldest_style_is_taken(tmp_path: Path, base: Skeleton, unet: Factors) -> None:
    file = builders.oldest_diffusers_lora(tmp_path / "lora.safetensors", {name: unet[name] for name in (LINEAR, OUT)})
    assert examine(file, base).layers == 2


def test_a_folder_of_peft_is_taken(tmp_path: Path, base: Skeleton) -> None:
    folder = builders.peft_lora(tmp_path / "lora", builders.pipeline().unet, ["attn1.to_q"], r=3, lora_alpha=5)
    (folder / "README.md").unlink()
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert examine(folder, base) == Checked("lora", rank=3, layers=4, bytes=size)


def test_a_lora_of_biases_alone_has_no_rank(tmp_path: Path, base: Skeleton) -> None:
    save_file({f"unet.{CONV}.diff_b": torch.ones(16)}, tmp_path / "lora.safetensors")
    assert examine(tmp_path / "lora.safetensors", base).rank == 0


def test_a_diffusers_folder_is_taken(base: Skeleton, tmp_path: Path) -> None:
    folder = builders.save_pipeline(tmp_path / "model", seed=1)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert examine(folder, base) == Checked("full", rank=None, layers=base.layers, bytes=size)
    load_pipeline(FoundBase("model", folder), CPU, TensorPool())


def test_old_names_of_the_vaes_attention_are_taken(folder: Path, base: Skeleton) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            new, was = next(((one, other) for one, other in old.items() if f".{one}." in name), ("", ""))
            tensors[name.replace(new, was)] = tensors.pop(name)

    edit(folder / VAE, rename)
    assert any(".query." in name for name in load_file(folder / VAE))
    assert examine(folder, base).kind == "full"
    load_pipeline(FoundBase("model", folder), CPU, TensorPool())


def test_half_precision_is_taken(folder: Path, base: Skeleton) -> None:
    for file in (UNET, VAE, TEXT):
        edit(folder / file, lambda tensors: tensors.update({name: one.half() for name, one in tensors.items()}))
    assert examine(folder, base).kind == "full"


def as_stable_diffusion_2(tensors: Tensors) -> None:
    """Makes the text encoder of a checkpoint what Stable Diffusion 2 calls it."""
    start, to = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    text = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
    for name, was in (
        ("token_embedding.weight", "embeddings.token_embedding.weight"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("ln_final.weight", "final_layer_norm.weight"),
        ("ln_final.bias", "final_layer_norm.bias"),
    ):
        tensors[to + name] = text[was]
    for number in range(2):
        block, was = f"{to}transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat([text[f"{was}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            tensors[f"{block}attn.out_proj.{kind}"] = text[f"{was}self_attn.out_proj.{kind}"]
            for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                tensors[f"{block}{ours}.{kind}"] = text[f"{was}{theirs}.{kind}"]
            for ours, theirs in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                tensors[f"{block}{ours}.{kind}"] = text[f"{was}{theirs}.{kind}"]
    tensors[f"{to}text_projection"] = torch.ones(16, 16)
    tensors[f"{to}logit_scale"] = torch.tensor(1.0)
    tensors[f"{to}transformer.resblocks.23.ln_1.bias"] = torch.ones(16)


def with_what_is_spare(tensors: Tensors) -> None:
    tensors["model_ema.decay"] = torch.tensor(1)
    tensors["alphas_cumprod"] = tensors["sqrt_recip_alphas_cumprod"] = torch.full((1000,), torch.inf)
    tensors["sqrt_recip_alphas_cumprod"] = tensors["alphas_cumprod"].clone()
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]


@pytest.mark.parametrize("change", [lambda tensors: None, as_stable_diffusion_2, with_what_is_spare])
def test_a_checkpoint_is_taken(
    tmp_path: Path, base_folder: Path, base: Skeleton, change: Callable[[Tensors], object]
) -> None:
    file = builders.single_file(base_folder, tmp_path / "model.safetensors")
    edit(file, change)
    assert examine(file, base) == Checked("full", rank=None, layers=base.layers, bytes=file.stat().st_size)
    loaded = load_pipeline(FoundBase("model", file, config=base_folder), CPU, TensorPool())
    text = builders.parameters_of(loaded.text_encoder)
    assert all(
        torch.equal(one, text[name]) for name, one in builders.parameters_of(builders.pipeline().text_encoder).items()
    )


def refused(path: Path, base: Skeleton, reason: str) -> ModelUnavailable:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        examine(path, base)
    assert str(path.parent) not in caught.value.detail
    return caught.value


def with_header(file: Path, header: Any, data: bytes = b"") -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + data)


DOWN = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
UP = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
BAD_LORAS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "1 bytes are missing"),
    "empty": (lambda f: f.write_bytes(b""), "not a safetensors file"),
    "a pickle": (lambda f: f.write_bytes(pickle.dumps({"weight": [1.0]})), "not a safetensors file"),
    "torch's": (lambda f: torch.save({"weight": torch.ones(1)}, f), "not a safetensors file"),
    "a header over 2 MB": (lambda f: with_header(f, b"{" + b" " * MAX_HEADER_BYTES + b"}"), "not a safetensors file"),
    "10,001 tensors": (lambda f: with_header(f, {f"t{n}": ONE for n in range(10_001)}, b"\0"), "10001 tensors"),
    "no tensor": (lambda f: with_header(f, {}), "holds no LoRA weights"),
    "NaN": (lambda f: edit(f, lambda t: t[DOWN].fill_(torch.nan)), "values that are not finite"),
    "infinity": (lambda f: edit(f, lambda t: t[UP].fill_(torch.inf)), "values that are not finite"),
    "another base": (lambda f: edit(f, lambda t: t.update({DOWN: torch.ones(2, 320, 1, 1)})), "the base's"),
    "rank 0": (lambda f: edit(f, lambda t: t.update({DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)})), "the base's"),
    "one factor": (lambda f: edit(f, lambda t: t.pop(UP)), "one of the two factors"),
    "DoRA": (lambda f: edit(f, lambda t: t.update({"lora_unet_mid.dora_scale": torch.ones(1)})), "DoRA"),
    "an unknown key": (lambda f: edit(f, lambda t: t.update({"what.is.this": torch.ones(1)})), "key what.is.this has"),
    "whole numbers": (lambda f: edit(f, lambda t: t.update({DOWN: t[DOWN].int()})), f"{DOWN} is of the type I32"),
    "8 bits": (lambda f: edit(f, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})), "of the type F8_E4M3"),
    "complex numbers": (lambda f: edit(f, lambda t: t.update({UP: t[UP] + 1j})), "of the type C64"),
}


@pytest.mark.parametrize(("damage", "reason"), BAD_LORAS.values(), ids=BAD_LORAS)
def test_a_bad_lora_is_refused(lora: Path, base: Skeleton, damage: Callable[[Path], object], reason: str) -> None:
    damage(lora)
    refused(lora, base, reason)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.SafeTensors", "model.safetensors.pt"])
def test_a_file_of_another_name_is_refused(lora: Path, base: Skeleton, name: str) -> None:
    assert "pickles" in refused(lora.rename(lora.with_name(name)), base, "is not named .safetensors").hint


def test_what_is_no_file_is_refused(lora: Path, base: Skeleton, tmp_path: Path) -> None:
    link, pipe, empty = (tmp_path / f"{name}.safetensors" for name in ("link", "pipe", "empty"))
    link.symlink_to(lora)
    os.mkfifo(pipe)
    empty.mkdir()
    refused(link, base, "link.safetensors is a link, or something else that is no file")
    refused(pipe, base, "no file")
    refused(empty, base, "has neither model_index.json nor one of")
    refused(tmp_path / "nothing.safetensors", base, "nothing.safetensors cannot be read")


BAD_PEFT: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda f: builders.edit_json(f / "adapter_config.json", lambda c: c.update(auto_map={})), "auto_map"),
    "DoRA": (lambda f: builders.edit_json(f / "adapter_config.json", lambda c: c.update(use_dora=True)), "DoRA"),
    "a pickle": (lambda f: (f / "adapter_model.bin").touch(), "adapter_model.bin is no part of a model"),
    "two": (lambda f: (f / "pytorch_lora_weights.safetensors").touch(), "nor one of"),
    "code beside": (lambda f: (f / "__init__.py").touch(), "__init__.py is no part"),
}


@pytest.mark.parametrize(("damage", "reason"), BAD_PEFT.values(), ids=BAD_PEFT)
def test_a_bad_folder_of_peft_is_refused(
    tmp_path: Path, base: Skeleton, damage: Callable[[Path], object], reason: str
) -> None:
    folder = builders.peft_lora(tmp_path / "lora", builders.pipeline().unet, ["attn1.to_q"])
    (folder / "README.md").unlink()
    damage(folder)
    refused(folder, base, reason)


CHECKPOINT_KEY = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_START = "cond_stage_model.transformer.text_model."
BAD_CHECKPOINTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (lambda t: t[CHECKPOINT_KEY].view(-1)[-1:].fill_(torch.nan), f"{CHECKPOINT_KEY} has values"),
    "another shape": (
        lambda t: t.update({CHECKPOINT_KEY: torch.ones(9, 4, 3, 3)}),
        r"conv_in.weight of \(9, 4, 3, 3\)",
    ),
    "a tensor less": (lambda t: t.pop(CHECKPOINT_KEY), "the model's unet has no conv_in.weight"),
    "no VAE": (lambda t: [t.pop(key) for key in list(t) if key.startswith("first_stage")], "the model's vae has no"),
    "no text encoder": (lambda t: [t.pop(key) for key in list(t) if key.startswith(TEXT_START)], "no text encoder"),
    "an unknown key": (lambda t: t.update({"what.is.this": torch.ones(1)}), "key what.is.this has no counterpart"),
    "an unknown key of the UNet": (
        lambda t: t.update({"model.diffusion_model.x": torch.ones(1)}),
        "diffusion_model.x has",
    ),
    "one block more": (
        lambda t: t.update({"model.diffusion_model.output_blocks.3.0.in_layers.9.bias": torch.ones(1)}),
        "which the base's has not",
    ),
    "a LoRA beside": (lambda t: t.update({DOWN: torch.ones(1)}), "lora_down.weight has no counterpart"),
    "8 bits": (lambda t: t.update({CHECKPOINT_KEY: t[CHECKPOINT_KEY].to(torch.float8_e5m2)}), "of the type F8_E5M2"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(
    tmp_path: Path, base_folder: Path, base: Skeleton, change: Callable[[Tensors], object], reason: str
) -> None:
    file = builders.single_file(base_folder, tmp_path / "model.safetensors")
    edit(file, change)
    refused(file, base, reason)


def settings(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: builders.edit_json(folder / name, lambda content: content.update(values))


def tensors(name: str, change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    return lambda folder: edit(folder / name, change)


def move(folder: Path, name: str, to: str) -> None:
    (folder / name).rename(folder / to)


def linked(folder: Path) -> None:
    move(folder, UNET, "../elsewhere")
    (folder / UNET).symlink_to(folder.parent / "elsewhere")


INDEX, CONFIG, STEPS = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WORDS = "tokenizer/tokenizer_config.json"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code of transformers": (settings("text_encoder/config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "code, hidden": (
        settings("tokenizer/tokenizer_config.json", a=[{"b": {"auto_map": 1}}]),
        "tokenizer_config.json wants",
    ),
    "a pipeline's code": (settings(INDEX, custom_pipeline="mine"), "custom_pipeline"),
    "a pipeline's class": (settings(INDEX, _class_name=["mine", "Pipeline"]), "is a "),
    "a foreign library": (settings(INDEX, unet=["os", "system"]), "code from os, which is refused"),
    "another family": (
        settings(INDEX, _class_name="StableDiffusionXLPipeline"),
        "the model is a StableDiffusionXLPipeline",
    ),
    "a class that is none": (settings(INDEX, vae=["diffusers", "__doc__"]), "does not load"),
    "a lesser VAE": (settings(INDEX, vae=["diffusers", "AutoencoderTiny"]), "the model's vae is a AutoencoderTiny"),
    "no tokenizer": (settings(INDEX, tokenizer=[None, None]), "the model's tokenizer is a None"),
    "more parts": (
        settings(INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]),
        "safety_checker",
    ),
    "JSON that is none": (lambda f: (f / CONFIG).write_text("{"), "unet/config.json cannot be read"),
    "deep JSON": (lambda f: (f / CONFIG).write_text("[" * 100_000), "unet/config.json cannot be read"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "unet/config.json cannot be read"),
    "a quantizer": (settings(CONFIG, quantization_config={"quant_method": "x"}), "quantization_config, which is not"),
    "a kernel of the hub": (
        settings("text_encoder/config.json", _attn_implementation="somebody/kernel"),
        "_attn_implementation, which is not known",
    ),
    "another size": (settings(CONFIG, block_out_channels=[16, 16]), r"the model's unet has a .*, the base's is"),
    "another size to train at": (settings(CONFIG, sample_size=10**6), "sample_size of 1000000"),
    "pictures of no range": (settings("vae/config.json", scaling_factor="wide"), "does not load"),
    "no such activation": (settings(CONFIG, act_fn="exec"), "does not load"),
    "a pickle": (lambda f: (f / "unet/diffusion_pytorch_model.bin").touch(), "diffusion_pytorch_model.bin is no part"),
    "a pickle alone": (lambda f: move(f, UNET, "unet/diffusion_pytorch_model.bin"), "is no part of a model"),
    "code": (lambda f: (f / "pipeline.py").touch(), "pipeline.py is no part of a model"),
    "another folder": (lambda f: (f / "vae_1").mkdir(), "vae_1 is no part of a model"),
    "a folder in a folder": (lambda f: (f / "unet/config.json.d").mkdir(), "no file"),
    "a link": (linked, f"{UNET} is a link"),
    "a pipe": (lambda f: os.mkfifo(f / "tokenizer/merges.txt"), "no file"),
    "no weights": (lambda f: (f / VAE).unlink(), "vae has no safetensors file"),
    "weights cut short": (lambda f: (f / TEXT).write_bytes((f / TEXT).read_bytes()[:-9]), "9 bytes are missing"),
    "a tensor less": (tensors(UNET, lambda t: t.pop("conv_in.bias")), "the model's unet has no conv_in.bias"),
    "a tensor more": (tensors(UNET, lambda t: t.update(more=torch.ones(1))), "unet has more, which the base's has not"),
    "another shape": (
        tensors(UNET, lambda t: t.update({"conv_in.bias": torch.ones(9)})),
        r"\(9,\), the base's is \(8,\)",
    ),
    "NaN": (tensors(VAE, lambda t: t["decoder.conv_in.bias"].fill_(torch.nan)), "decoder.conv_in.bias has values"),
    "a larger vocabulary": (
        settings("tokenizer/tokenizer_config.json", model_max_length=1000),
        "tokenizer is not the base's",
    ),
    "more words": (settings(WORDS, additional_special_tokens=["<new>"]), "tokenizer is not the base's"),
    "too many steps": (settings(STEPS, num_train_timesteps=2000), "another num_train_timesteps"),
    "steps that nothing has room for": (settings(STEPS, num_train_timesteps=2**53), "another num_train_timesteps"),
    "another size to draw at": (settings(STEPS, _shorter_side=100_000), "another _shorter_side"),
    "no such schedule": (settings(STEPS, beta_schedule="mine"), "does not load"),
    "a scheduler of another kind": (
        settings(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "FlowMatchEulerDiscreteScheduler",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_refused(folder: Path, base: Skeleton, damage: Callable[[Path], object], reason: str) -> None:
    damage(folder)
    refused(folder, base, reason)


def test_a_large_json_is_not_read(folder: Path, base: Skeleton) -> None:
    with (folder / CONFIG).open("ab") as file:
        file.truncate(17 * 1024**2)
    refused(folder, base, "unet/config.json is larger than 16 MB")


def test_models_over_other_families_are_not_taken(tmp_path: Path) -> None:
    folder = families.save("sd3", tmp_path / "sd3")
    with pytest.raises(InvalidRequest, match="models over a StableDiffusion3Pipeline are not taken"):
        Skeleton.of(FoundBase("base", folder))


def test_a_base_that_cannot_be_read_is_unavailable(folder: Path) -> None:
    (folder / CONFIG).unlink()
    with pytest.raises(ModelUnavailable, match="models/base does not load"):
        Skeleton.of(FoundBase("models/base", folder))
