"""LoRAs for the stock lane: loaded by diffusers itself, under a name, into copies of the modules that they change.

The copies share the base's weights and hold the LoRA's beside them. The base never has an adapter, so there is none to
be taken off it, whatever happens, and no two users meet.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from api.engine.adapters import read_alphas, refuse_dora
from api.engine.components import ONE_LOAD
from api.engine.weights import loading, read_header, tensors_of
from api.errors import ModelUnavailable

NAME = "sitter"  # in no name of a parameter: transformers takes what contains it for the adapter's
# What a key ends with, in the style of diffusers, peft, kohya or XLabs. All else changes whole weights.
FACTOR = re.compile(r"lora(_linear_layer|\d)?[._](?P<role>A|B|down|up)\.weight$|\.alpha$")
PEFT = "base_model.model."
UP = ".lora_B.weight"
OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
HINT = "Is it a LoRA for this base?"


@dataclass(frozen=True, eq=False)
class StockAdapter:
    """Component → the copy of the base's that has the LoRA."""

    modules: dict[str, nn.Module]

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor that it keeps alive: the factors, on the device, and the base's weights beside them."""
        for module in self.modules.values():
            yield from tensors_of(module)


def load_stock_adapter(file: Path, pipeline: DiffusionPipeline, strength: float) -> StockAdapter:
    """Returns the adapter in `file`, on the device of its base.

    Args:
        file: where its weights are; peft's adapter_config.json may lie beside it.
        pipeline: the base that it is for.
        strength: multiplies it; 1 is as trained.

    Raises:
        ModelUnavailable: the file is not whole, not a plain LoRA, or made for another base.
    """
    _check_keys(read_header(file).keys() - {"__metadata__"})
    known = getattr(pipeline, "_lora_loadable_modules", ())
    components = {name: module for name in known if (module := getattr(pipeline, name, None)) is not None}
    if not components:
        raise ModelUnavailable(f"a {type(pipeline).__name__} takes no LoRA")
    own = copy.copy(pipeline)
    with loading(f"the adapter {file.name}", file, HINT), ONE_LOAD:
        own.register_modules(**{name: _copy(module) for name, module in components.items()})
        factors = _read(file, list(components))
        own.load_lora_weights(factors, adapter_name=NAME)
        changed = {name: getattr(own, name) for name in components if any(_layers(getattr(own, name)))}
        _check(changed, components, factors)
        own.set_adapters(NAME, strength)
    for module in changed.values():
        module.requires_grad_(False).eval()
    return StockAdapter(changed)


def _check_keys(keys: Set[str]) -> None:
    """Raises ModelUnavailable when the keys are not those of a plain LoRA: diffusers would do what they say, or not."""
    for key in sorted(keys):
        refuse_dora(key)
        if not (found := FACTOR.search(key)):
            raise ModelUnavailable(f"the adapter's key {key} is not a plain LoRA's", "Train it as a plain LoRA.")
        start, end = found.span("role")
        if found["role"] and f"{key[:start]}{OTHER[found['role']]}{key[end:]}" not in keys:
            raise ModelUnavailable(f"the adapter has one of the two factors of {key} only", "The file is incomplete.")


def _copy(module: nn.Module) -> nn.Module:
    """Returns a copy that shares all tensors, and all parts without any: some of those remember what they computed."""
    shared = [*tensors_of(module), *(part for part in module.modules() if next(part.parameters(), None) is None)]
    return copy.deepcopy(module, {id(one): one for one in shared})


def _read(file: Path, components: Sequence[str]) -> dict[str, Tensor]:
    """Returns what is given to diffusers: the file's tensors, with alphas that stand beside them multiplied in.

    diffusers would make peft's configuration of those, which may ask for more than alphas: regular expressions that
    run forever, or other weights for the base itself.
    """
    factors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as tensors:
        alphas = read_alphas(file, tensors.metadata() or {}, components)
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            name = key.removeprefix(PEFT)
            if name != key and name.split(".")[0] not in components:  # peft saves a bare transformer so
                name = f"{components[0]}.{name}"
            factors[name] = tensors.get_tensor(key)
    for name, tensor in factors.items():
        component, _, layer = name.partition(".")
        if not torch.isfinite(tensor).all():
            raise ModelUnavailable(f"the adapter's {name} has values that are not finite", "Train or export it again.")
        if name.endswith(UP) and component in alphas:
            scale = alphas[component].scale(layer.removesuffix(UP), tensor.shape[1], None)
            if not math.isfinite(scale):
                raise ModelUnavailable(f"the adapter's {layer} has an alpha that is not finite")
            factors[name] = tensor.float() * scale
    return factors


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the layers that the adapter has changed, by name."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


def _check(changed: dict[str, nn.Module], base: dict[str, nn.Module], factors: dict[str, Tensor]) -> None:
    """Raises ModelUnavailable when diffusers left out a part of the adapter, or made of the base what it is not."""
    if not changed:
        raise ModelUnavailable("the adapter changes nothing in its base", HINT)
    layers = {f"{component}.{name}": layer for component, module in changed.items() for name, layer in _layers(module)}
    for name, layer in layers.items():
        component, _, path = name.partition(".")
        if layer.get_base_layer().weight is not base[component].get_submodule(path).weight:
            raise ModelUnavailable(f"the adapter's {name} has another shape than the base's", HINT)
    for key in factors:
        name = key.removesuffix(UP)
        spellings = {name, name.replace(".text_model.", ".", 1)}  # the first of transformers before 5
        if key.endswith(UP) and key.split(".")[0] in base and not spellings & layers.keys():
            raise ModelUnavailable(f"the adapter's key {key} has no counterpart in the base", HINT)
