"""Random LoRAs over a UNet's attention layers: the same files for the same seed."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

STRENGTH = 0.4  # the spread of what a LoRA adds, over that of the weights: shows in a picture and does not ruin it


def write_loras(
    folder: Path, unet: nn.Module, users: Iterable[str], ranks: Sequence[int], seed: int
) -> dict[str, Path]:
    """Writes a LoRA for each user as diffusers would, float32, the ranks in turn; returns user → file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    files = {}
    for user, rank in zip(users, itertools.cycle(ranks), strict=False):
        files[user] = folder / f"{user}.safetensors"
        save_file(_random_lora(unet, rank, generator), files[user])
    return files


def _random_lora(unet: nn.Module, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear) or ".attn" not in name:
            continue
        spread = STRENGTH * float(layer.weight.detach().std()) / rank**0.5
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * spread
    return tensors
