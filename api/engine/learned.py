"""What a training changes, beside a base that stays as it is: factors of low rank, or all weights of a copy of it.

Both are for some of the base's modules, its components. What steps change is in float32, whatever the base has: they
are small. What is kept of it in the end is in float16.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from api.engine.components import ONE_LOAD
from api.engine.weights import shell

UNET, ENCODERS = "unet", ("text_encoder", "text_encoder_2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
POOLED_TEXT = "time_emb_proj"  # where a base whose pooled text joins the timestep hears of it
OLD_NAMES = re.compile(r"^(text_encoder\w*)\.(embeddings|encoder|final_layer_norm)\.")
STEP_BYTES = 4 * torch.float32.itemsize  # of a weight: itself, its gradient, and both moments


class Learned(Protocol):
    """What a training changes.

    Attributes:
        modules: by component: they run in place of the base's own.
        parameters: what steps change of them, by component and name.
    """

    modules: Mapping[str, Any]
    parameters: Mapping[str, nn.Parameter]

    def passes(self) -> AbstractContextManager[Any]:
        """Has the UNet run in the base's precision inside the block."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns what is kept of it: in float16, on the host, under the names that files give them."""


class Factors:
    """Factors of low rank beside the attention layers (LoRA, https://arxiv.org/abs/2106.09685); weights are the base's.

    Args:
        pipeline: the base.
        components: of it, the UNet first.
        rank: of the factors.
        seed: of their start.
    """

    def __init__(self, pipeline: Any, components: Sequence[str], rank: int, seed: int) -> None:
        self.modules: Mapping[str, Any] = {
            name: shell(getattr(pipeline, name)).requires_grad_(False) for name in components
        }
        self.parameters: Mapping[str, nn.Parameter] = {
            name: factor
            for component, module in self.modules.items()
            for name, factor in _with_factors(component, module, _targets(component, module), rank).items()
        }
        chance = torch.Generator().manual_seed(seed)
        for name, factor in self.parameters.items():
            start = torch.zeros(factor.shape)
            if ".lora_A." in name:
                start.normal_(std=1 / rank, generator=chance)
            factor.data = start.to(pipeline.device)

    def passes(self) -> AbstractContextManager[Any]:
        """Does nothing: the weights are the base's, and peft brings what the factors hear into their precision."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the factors under the names that diffusers gives them."""
        return {_spelled(name.replace(".default", "")): _half(factor) for name, factor in self.parameters.items()}


class Weights:
    """All weights of copies of the base's modules, as the paper trains them.

    Args:
        pipeline: the base.
        components: of it, the UNet first.
    """

    def __init__(self, pipeline: Any, components: Sequence[str]) -> None:
        self.modules: Mapping[str, Any] = {name: _trainable(getattr(pipeline, name)) for name in components}
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{component}.{name}": weight
            for component, module in self.modules.items()
            for name, weight in module.named_parameters()
        }
        self._device, self._dtype = pipeline.device.type, pipeline.unet.dtype
        if self._device != "cpu":  # a third more time, and gigabytes less for what is kept for the way back
            self.modules[UNET].enable_gradient_checkpointing()

    def passes(self) -> AbstractContextManager[Any]:
        """Has layers compute in the base's precision; each weight is brought into it once, so that no cast is kept."""
        lower = self._dtype != torch.float32
        return torch.autocast(self._device, self._dtype if lower else None, enabled=lower, cache_enabled=False)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the weights under the names that their files have, after the component's."""
        return {_spelled(name): _half(weight) for name, weight in self.parameters.items()}


def step_bytes(pipeline: Any, components: Sequence[str]) -> int:
    """Returns what `Weights` and their steps take beside the base, but for activations."""
    modules = [getattr(pipeline, name) for name in components]
    return sum(STEP_BYTES * weight.numel() for module in modules for weight in module.parameters())


def components_of(pipeline: Any, *, texts: bool) -> list[str]:
    """Returns the components that learn: the UNet, and the text encoders where `texts` are to."""
    return [UNET, *(name for name in ENCODERS if texts and getattr(pipeline, name, None) is not None)]


def _targets(component: str, module: Any) -> list[str]:
    if component != UNET:
        return TEXT_ATTENTION
    return [*ATTENTION, *([POOLED_TEXT] if module.config.get("addition_embed_type") == "text" else [])]


def _with_factors(component: str, module: nn.Module, targets: list[str], rank: int) -> dict[str, nn.Parameter]:
    """Puts factors beside the layers of `module` that end with `targets`; returns them by name."""
    with ONE_LOAD:  # while another model loads, its library has changed how torch makes parameters
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), module)
    return {f"{component}.{name}": one for name, one in module.named_parameters() if one.requires_grad}


def _trainable(module: Any) -> Any:
    return copy.deepcopy(module).to(torch.float32, memory_format=torch.contiguous_format).requires_grad_(True)


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().half().cpu().contiguous()


def _spelled(name: str) -> str:
    # Before transformers 5 an encoder had one more level; every reader of files knows that spelling.
    return OLD_NAMES.sub(r"\1.text_model.\2.", name)
