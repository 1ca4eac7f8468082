"""LoRA files with the keys of kohya's sd-scripts, which A1111 and ComfyUI read as well.

There a layer has its name in the base with every dot an underscore, two factors, and an alpha of its own beside them:
its weight becomes W + alpha / rank · B A (https://github.com/kohya-ss/sd-scripts, networks/lora.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from api.engine.adapters import COMPONENTS, ENDINGS, PREFIXES, Alphas, read_alphas, refuse_dora
from api.engine.weights import NOTE, loading, read_header
from api.errors import ModelUnavailable

# transformers 5 has dropped the text model's level, kohya's keys have not.
STARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# How wide the texts are that layers read, and whether that is Stable Diffusion 2. Nothing else there is as wide.
IS_2 = {768: False, 1024: True}


@dataclass(frozen=True)
class _Layer:
    """The factors of one layer: `down` (rank, in…) and `up` (out, rank…), which count alpha / rank."""

    name: str
    down: Tensor
    up: Tensor
    alpha: float

    def tensors(self) -> dict[str, Tensor]:
        """Returns all of it by kohya's keys; the alpha in float32, as not all are numbers of float16."""
        return {
            f"{self.name}.lora_down.weight": self.down,
            f"{self.name}.lora_up.weight": self.up,
            f"{self.name}.alpha": torch.tensor(self.alpha, dtype=torch.float32),
        }


def to_kohya(file: Path) -> bytes:
    """Returns a whole safetensors file that has the LoRA in `file` with kohya's keys, and says of itself what is known.

    The factors are the file's own, in its precision. One file gives the same bytes every time.

    Args:
        file: a LoRA for Stable Diffusion 1 or 2, in any style that `adapters` reads, kohya's too; peft's
            adapter_config.json may lie beside it. No base is asked whether it has these layers.

    Raises:
        ModelUnavailable: the file is not whole, or not a LoRA of two finite factors for each layer.
    """
    read_header(file)
    with loading(f"the adapter {file.name}", file, "Export it again."):
        return _written(*_read(file))


def _read(file: Path) -> tuple[list[_Layer], dict[str, str]]:
    """Returns the layers in `file` and its metadata."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata() or {}
        alphas = read_alphas(file, metadata, COMPONENTS)
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            component, layer, role = _parse(key)
            found.setdefault((component, layer), {})[role] = tensors.get_tensor(key)
    if not found:
        raise ModelUnavailable(f"{file.name} holds no LoRA weights")
    return [_layer(component, layer, roles, alphas[component]) for (component, layer), roles in found.items()], metadata


def _parse(key: str) -> tuple[str, str, str]:
    """Returns the component, the layer as the file spells it, and the role of `ENDINGS` that a key names."""
    refuse_dora(key)
    for (ending, role), (prefix, component) in product(ENDINGS, PREFIXES.items()):
        if key.startswith(prefix) and key.endswith(ending):
            return component, key[len(prefix) : -len(ending)], role
    raise ModelUnavailable(f"the adapter's key {key} is not a LoRA's for Stable Diffusion", "Is it for another base?")


def _layer(component: str, layer: str, roles: Mapping[str, Tensor], alphas: Alphas) -> _Layer:
    if odd := sorted(roles.keys() & {"weight", "bias"}):
        raise ModelUnavailable(f"the adapter adds to {layer}'s {odd[0]}, which no two factors do")
    if not {"A", "B"} <= roles.keys():
        raise ModelUnavailable(f"the adapter has one of the two factors of {layer} only", "The file is incomplete.")
    down, up = roles["A"], roles["B"]
    rank = down.shape[0] if down.dim() > 1 else 0
    # A convolution's product is (out, rank) @ (rank, in·k·k): B must be 1×1.
    if not rank or up.shape[1:2] != (rank,) or up.shape[1:].numel() != rank:
        raise ModelUnavailable(f"the adapter's {layer} is {tuple(up.shape)} @ {tuple(down.shape)}, which is no product")
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ModelUnavailable(f"the adapter's {layer} has values that are not finite", "Train or export it again.")
    alpha = rank * alphas.scale(layer, rank, roles.get("alpha"))
    if not math.isfinite(alpha) or alpha == 0:  # sd-scripts takes 0 for the rank
        raise ModelUnavailable(f"the adapter's {layer} has the alpha {alpha}, which kohya's files cannot have")
    return _Layer(_name(component, layer), down, up, alpha)


def _name(component: str, layer: str) -> str:
    """Returns kohya's name of a layer: `down_blocks.0.….to_q` of the UNet is `lora_unet_down_blocks_0_…_to_q`."""
    name = layer.replace(".processor", "").replace(".", "_")
    if name.endswith("_to_out"):  # the oldest diffusers wrote that for to_out.0
        name += "_0"
    return STARTS[component] + (name if component == "unet" else name.removeprefix("text_model_"))


def _written(layers: Sequence[_Layer], metadata: Mapping[str, str]) -> bytes:
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one({str(layer.down.shape[0]) for layer in layers}),
        "ss_network_alpha": _one({f"{layer.alpha:g}" for layer in layers}),
    }
    # A1111 takes a file that says something, but not this, for Stable Diffusion 1's, and does not list it beside 2.
    if widths := {layer.down.shape[1] for layer in layers} & IS_2.keys():
        said["ss_v2"] = str(IS_2[max(widths)])
    if NOTE in metadata:
        said[NOTE] = metadata[NOTE]
    return _with_metadata(save({key: one for layer in layers for key, one in layer.tensors().items()}), said)


def _one(values: set[str]) -> str:
    """Returns the only value; where layers differ, what sd-scripts writes for that."""
    return values.pop() if len(values) == 1 else "Dynamic"


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file without metadata, with some: in this order, where the library writes it in any.

    Format: https://github.com/huggingface/safetensors#format. Offsets count from the header's end.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(content[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + content[end:]
