"""Tiny models of the real classes with random weights, and adapter and checkpoint files in every style."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from api.config import ModelSource, Settings
from api.engine.adapters import COMPONENTS, Adapter, Layer, Norm, merged
from api.schemas import GenerateRequest
from bench import random_model

Tensors = dict[str, torch.Tensor]


SCHEDULER = random_model.SCHEDULER  # those of Stable Diffusion 1, also in small
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": (4, 4, 4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 2,
}


def read_tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(random_model.TOKENIZER)


def pipeline(seed: int = 0, *, vae: Mapping[str, Any] = VAE, scheduler: Any = None) -> StableDiffusionPipeline:
    """A Stable Diffusion 1 in small; `seed` makes the UNet, the rest is the same for all."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        words = read_tokenizer()
        text_config = CLIPTextConfig(
            vocab_size=len(words),
            max_position_embeddings=words.model_max_length,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        text_encoder, autoencoder = CLIPTextModel(text_config), AutoencoderKL(**vae)
        # At transformers' usual 0.02 two prompts differ in the last digits only.
        for parameter in text_encoder.parameters():
            parameter.data.mul_(5)
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**UNET)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_merged(base: StableDiffusionPipeline, adapter: Adapter | None) -> StableDiffusionPipeline:
    """A pipeline that draws as the adapter's user expects, in the simplest way there is; the base itself for None."""
    if adapter is None:
        return base
    changed = {name: merged(getattr(base, name), adapter, name) for name in COMPONENTS}
    return StableDiffusionPipeline(**{**base.components, **changed}, requires_safety_checker=False)


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    pipeline(seed).save_pretrained(folder)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(folder, to))


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def source(base: Path | str, **fields: Any) -> ModelSource:
    return ModelSource(base=str(base), **fields)


def settings(users: Mapping[str, ModelSource] | None = None, **fields: Any) -> Settings:
    """Settings that nothing outside the test reaches."""
    given = {"_env_file": None, "host_cache_gb": 1.0, "use_gpu": False, "dtype": "float32", **fields}
    return Settings(user_models=dict(users or {}), **given)


def request(**fields: Any) -> GenerateRequest:
    small = {"prompt": "photo of sks person as an astronaut", "num_inference_steps": 2, "width": 256, "height": 256}
    return GenerateRequest(**{**small, "seed": 7, **fields})


# Layers of the tiny pipeline that adapters change: a linear one, the 1×1 and the 3×3 convolution, and the text's.
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
POINTWISE = "mid_block.attentions.0.proj_in"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT_LAYERS = ("encoder.layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj")
UNET_LAYERS = (LINEAR, OUT, POINTWISE, CONV)


def factors(model: torch.nn.Module, layers: tuple[str, ...], rank: int = 2, seed: int = 5) -> dict[str, Tensors]:
    """Random `{layer: {"A": (rank, in…), "B": (out, rank…)}}`, strong enough to show in a picture."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        down = (rank, *weight.shape[1:])
        up = (weight.shape[0], rank, *[1] * (weight.dim() - 2))
        made[name] = {
            "A": torch.randn(down, generator=generator) * 0.5,
            "B": torch.randn(up, generator=generator) * 0.5,
        }
    return made


Factors = Mapping[str, Tensors]


def _flat(named: Factors, key: Callable[[str, str], str]) -> Tensors:
    return {key(layer, role): tensor.clone() for layer, pair in named.items() for role, tensor in pair.items()}


def diffusers_lora(file: Path, unet: Factors, text: Factors, config: Mapping[str, Any] | None = None) -> Path:
    """As `save_lora_weights` writes it; `config` is the metadata: `{"unet.lora_alpha": 4, …}`."""
    named = {f"unet.{name}": pair for name, pair in unet.items()}
    named |= {f"text_encoder.{name}": pair for name, pair in text.items()}
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config else {})
    save_file(_flat(named, lambda layer, role: f"{layer}.lora_{role}.weight"), file, metadata)
    return file


def old_diffusers_lora(file: Path, unet: Factors, text: Factors) -> Path:
    """As diffusers wrote it before it used peft."""
    way = {"A": "down", "B": "up"}
    tensors = _flat(unet, lambda layer, role: f"unet.{layer}.lora.{way[role]}.weight")
    tensors |= _flat(text, lambda layer, role: f"text_encoder.text_model.{layer}.lora_linear_layer.{way[role]}.weight")
    save_file(tensors, file)
    return file


def oldest_diffusers_lora(file: Path, unet: Factors) -> Path:
    """As diffusers wrote the attention layers in 2023: `….attn1.processor.to_q_lora.down.weight`."""
    ends = {"A": "down", "B": "up"}

    def key(layer: str, role: str) -> str:
        block, name = re.fullmatch(r"(.*)\.(to_q|to_k|to_v|to_out)(?:\.0)?", layer).groups()  # type: ignore[union-attr]
        return f"unet.{block}.processor.{name}_lora.{ends[role]}.weight"

    save_file(_flat(unet, key), file)
    return file


def peft_lora(folder: Path, unet: Any, targets: Iterable[str], **config: Any) -> Path:
    """As peft itself saves a UNet's LoRA; leaves the adapter in `unet`, which draws as peft would."""
    torch.manual_seed(5)
    given = {"r": 2, "init_lora_weights": False, **config}
    model = get_peft_model(unet, LoraConfig(target_modules=list(targets), **given))
    model.save_pretrained(folder)
    return folder


def kohya_lora(file: Path, unet: Factors, text: Factors, alpha: float | None = None) -> Path:
    """As kohya's sd-scripts write it: underscores, an alpha for each layer."""
    ends = {"A": "lora_down.weight", "B": "lora_up.weight"}
    named = {"lora_unet_" + name.replace(".", "_"): pair for name, pair in unet.items()}
    named |= {"lora_te_text_model_" + name.replace(".", "_"): pair for name, pair in text.items()}
    tensors = _flat(named, lambda layer, role: f"{layer}.{ends[role]}")
    if alpha is not None:
        tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer in named}
    save_file(tensors, file)
    return file


RESNET_TO_LDM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TO_LDM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    # One layer a block: (resnet, downsampler) down, (resnet, resnet and upsampler) up.
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
VAE_TO_LDM: list[tuple[str, Any]] = [
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda hit: f"up.{3 - int(hit[1])}.block.{hit[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda hit: f"up.{3 - int(hit[1])}.upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
]


def _unet_to_ldm(key: str) -> str:
    for ours, theirs in UNET_TO_LDM.items():
        if key.startswith(f"{ours}."):
            rest = key.removeprefix(ours)
            if "resnets" in ours:
                part = rest.split(".")[1]
                rest = rest.replace(part, RESNET_TO_LDM[part], 1)
            return f"model.diffusion_model.{theirs}{rest}"
    raise KeyError(key)


def _vae_to_ldm(key: str) -> str:
    for pattern, name in VAE_TO_LDM:
        key = re.sub(pattern, name, key)
    return f"first_stage_model.{key}"


def single_file(folder: Path, file: Path) -> Path:
    """The pipeline saved in `folder` as one checkpoint in the layout of the original Stable Diffusion 1."""
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder/model.safetensors")
    tensors = {_unet_to_ldm(key): tensor for key, tensor in unet.items()}
    for key, tensor in vae.items():
        is_projection = ".attentions." in key and tensor.dim() == 2  # 1×1 convolutions once
        tensors[_vae_to_ldm(key)] = tensor[:, :, None, None].contiguous() if is_projection else tensor
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    save_file(tensors, file)
    return file


def parameters_of(module: torch.nn.Module) -> Tensors:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@torch.no_grad()
def finetuned(base: StableDiffusionPipeline, rank: int, seed: int = 3) -> StableDiffusionPipeline:
    """`base` itself, every layer changed by a product of that rank, and every bias and norm; embeddings stay."""
    generator = torch.Generator().manual_seed(seed)
    for component in COMPONENTS:
        for layer in getattr(base, component).modules():
            if isinstance(layer, Layer):
                out, inside = layer.weight.flatten(1).shape
                up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, inside, generator=generator)
                change = (up @ down).reshape(layer.weight.shape)
                layer.weight += change * 0.5 * layer.weight.norm() / change.norm()
            if isinstance(layer, Layer | Norm):
                for parameter in (layer.bias, layer.weight if isinstance(layer, Norm) else None):
                    if parameter is not None:
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return base
