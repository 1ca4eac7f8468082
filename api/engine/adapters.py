"""LoRA adapters: read from diffusers, peft and kohya files, and checked against their base.

A LoRA holds, for some layers, factors A (rank, in) and B (out, rank): the layer's weight becomes
W + scale · B A, with scale = alpha / rank (Hu et al., https://arxiv.org/abs/2106.09685, section 4.1).
Only the factors are kept per user: `slots` adds their products to what the layers say, row by row. Merged weights are
for what cannot ride along so, and live as long as the drawing that uses them. Some files change biases and norms, too:
`.diff_b` is added to a bias, `.diff` to the weight of a norm, as LyCORIS and ComfyUI write them.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import nn

from api.engine.sources import LORA_FILES
from api.engine.weights import SAFETENSORS_HINT, loading, read_header, shell
from api.errors import ModelUnavailable

Layer: TypeAlias = nn.Linear | nn.Conv2d
Norm: TypeAlias = nn.GroupNorm | nn.LayerNorm
Module = TypeVar("Module", bound=nn.Module)
COMPONENTS = ("unet", "text_encoder")
Group = Literal["lora", "delta", "fast"]
"""What an adapter is: a user's LoRA, what stands for a whole checkpoint, or either with what its base draws fast with.

Apart, because the last two change every layer: rows that carry a small LoRA shall not pay for that.
"""

# (ending of a key, which factor it is); the first three styles also name the layer by dots, kohya by underscores.
ENDINGS = (
    (".lora_A.weight", "A"),  # peft, and diffusers since 0.22
    (".lora_B.weight", "B"),
    (".lora.down.weight", "A"),  # diffusers before
    (".lora.up.weight", "B"),
    (".lora_linear_layer.down.weight", "A"),  # the same, for the text encoder
    (".lora_linear_layer.up.weight", "B"),
    ("_lora.down.weight", "A"),  # diffusers' attention processors, the oldest
    ("_lora.up.weight", "B"),
    (".lora_down.weight", "A"),  # kohya
    (".lora_up.weight", "B"),
    (".alpha", "alpha"),
    (".diff_b", "bias"),
    (".diff", "weight"),
    (".b_norm", "bias"),
    (".w_norm", "weight"),
)
CHECKPOINT = "sitter_checkpoint"  # in the metadata of a file that stands for a whole model
PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "base_model.model.unet.": "unet",
    "base_model.model.text_encoder.": "text_encoder",
    "base_model.model.": "unet",  # peft saves a bare UNet so
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
}


@dataclass(frozen=True)
class LayerDelta:
    """The factors of one layer: `down` (rank, in…) and `up` (out, rank…), as stored, and what their product counts.

    The rank may be 0. `bias` (out,) is added to the layer's own as it is.
    """

    component: str
    layer: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """How many columns the factors have."""
        return self.down.shape[0]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the factors, and the bias if there is one."""
        yield from (self.down, self.up)
        if self.bias is not None:
            yield self.bias

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W + scale · B A in the shape, precision and place of `weight`, summed in float32."""
        up, down = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.up, self.down))
        delta = (up @ down).reshape(weight.shape)
        return (weight.float() + self.scale * delta).to(weight.dtype)

    def parameters(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Returns what the layer's parameters become, by name."""
        changed = {"weight": self.merged(layer.weight)}
        if self.bias is not None:
            assert layer.bias is not None  # the adapter was checked against it
            changed["bias"] = _sum(layer.bias, self.bias)
        return changed


@dataclass(frozen=True)
class NormDelta:
    """What is added to the weight and the bias of a norm: (channels,) each."""

    component: str
    layer: str
    weight: torch.Tensor
    bias: torch.Tensor
    rank = 0

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields both."""
        yield from (self.weight, self.bias)

    def parameters(self, layer: Norm) -> dict[str, torch.Tensor]:
        """Returns what the norm's parameters become, by name."""
        return {"weight": _sum(layer.weight, self.weight), "bias": _sum(layer.bias, self.bias)}


Delta: TypeAlias = LayerDelta | NormDelta


def _pinned(delta: Delta) -> Delta:
    values = vars(delta).items()
    tensors: dict[str, Any] = {name: value.pin_memory() for name, value in values if isinstance(value, torch.Tensor)}
    return replace(delta, **tensors)


def _sum(parameter: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return (parameter.float() + change.to(parameter.device, torch.float32)).to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA, checked against its base: every layer exists there and every product has its weight's shape.

    `of_checkpoint` says that it stands for a whole model, `fast` that it has in it what its base draws few steps with;
    `key` names it where it is not to be kept alive.
    """

    deltas: tuple[Delta, ...]
    of_checkpoint: bool = False
    fast: bool = False
    key: object = field(default_factory=object)

    @property
    def group(self) -> Group:
        """Which others it shares forwards with."""
        return "fast" if self.fast else "delta" if self.of_checkpoint else "lora"

    def of(self, component: str) -> dict[str, Delta]:
        """Returns what it changes in a component, by the layer's name."""
        return {delta.layer: delta for delta in self.deltas if delta.component == component}

    def pinned(self) -> "Adapter":
        """Returns it in host memory that a CUDA device reads by itself (page-locked)."""
        return replace(self, deltas=tuple(_pinned(delta) for delta in self.deltas))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields every tensor that is kept."""
        for delta in self.deltas:
            yield from delta.tensors()


def find_adapter_file(path: Path) -> Path:
    """Returns the weight file of the adapter at `path`, a folder or a file.

    Raises:
        ModelUnavailable: there is none.
    """
    if path.is_file():
        return path
    for name in LORA_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not path.exists():
        raise ModelUnavailable(f"the adapter {path.name} is not there", "Check its entry in USER_MODELS.")
    raise ModelUnavailable(f"{path.name} has no {LORA_FILES[0]}", SAFETENSORS_HINT)


def load_adapter(file: Path, pipeline: StableDiffusionPipeline, strength: float) -> Adapter:
    """Returns the adapter in `file`, its factors on the host, for the base `pipeline`.

    Args:
        file: where its weights are; peft's adapter_config.json may lie beside it.
        pipeline: the base that it is for.
        strength: multiplies every scale; 1 is as trained.

    Raises:
        ModelUnavailable: the file is not whole, not a LoRA, of a kind that is refused (DoRA), or made for
            another base. The reason names the first key that does not fit.
    """
    read_header(file)
    with loading(f"the adapter {file.name}", file, "Export it again."):
        return _read(file, pipeline, strength)


def _read(file: Path, pipeline: StableDiffusionPipeline, strength: float) -> Adapter:
    layers = {component: _layers(getattr(pipeline, component)) for component in COMPONENTS}
    factors: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata() or {}
        alphas = read_alphas(file, metadata, COMPONENTS)
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            component, layer, role = _parse(key, layers)
            factors.setdefault((component, layer), {})[role] = tensors.get_tensor(key)
    if not factors:
        raise ModelUnavailable(f"{file.name} holds no LoRA weights")
    return Adapter(
        tuple(
            _delta(component, layer, roles, layers[component], alphas[component], strength)
            for (component, layer), roles in sorted(factors.items())
        ),
        of_checkpoint=CHECKPOINT in metadata,
    )


def merged(module: Module, adapter: Adapter, component: str) -> Module:
    """Returns a copy of `module`, the `component` of its base, with the adapter merged; it shares all other weights."""
    copy = shell(module)
    for name, delta in adapter.of(component).items():
        layer: Any = copy.get_submodule(name)
        for parameter, value in delta.parameters(layer).items():
            # Not `layer.weight = …`: while another thread loads a model, accelerate has that put weights on "meta".
            layer._parameters[parameter] = nn.Parameter(value, requires_grad=False)
    return copy


def _layers(model: nn.Module) -> dict[str, tuple[str, Layer | Norm]]:
    """Returns the layers a LoRA may change by their name with every separator an underscore, as kohya writes it."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Layer | Norm))
    return {name.replace(".", "_"): (name, layer) for name, layer in layers}


def refuse_dora(key: str) -> None:
    """Raises ModelUnavailable when a key of the file is a DoRA's."""
    if "dora_scale" in key or "lora_magnitude_vector" in key:
        raise ModelUnavailable(f"the adapter is a DoRA ({key}), which is not supported", "Train it as a plain LoRA.")


def _parse(key: str, layers: dict[str, dict[str, tuple[str, Layer | Norm]]]) -> tuple[str, str, str]:
    """Returns the component, the layer and the role of `ENDINGS` that a key of the file names."""
    refuse_dora(key)
    for ending, role in ENDINGS:
        if not key.endswith(ending):
            continue
        for prefix, component in PREFIXES.items():
            if key.startswith(prefix):
                name = key[len(prefix) : -len(ending)].replace(".processor", "").replace(".", "_")
                # The oldest diffusers wrote to_out for to_out.0; transformers before 5 had one more level.
                for candidate in (name, f"{name}_0", name.removeprefix("text_model_")):
                    if candidate in layers[component]:
                        return component, candidate, role
    raise ModelUnavailable(f"the adapter's key {key} has no counterpart in the base", "Is it a LoRA for this base?")


@dataclass(frozen=True)
class Alphas:
    """The alphas of a component whose file keeps them beside the tensors, as peft and diffusers do."""

    alpha: float | None = None
    patterns: dict[str, float] = field(default_factory=dict)  # by the last parts of the layer's name
    rank_stabilized: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Alphas":
        """Reads the fields of a peft LoraConfig."""
        if config.get("use_dora"):
            raise ModelUnavailable("the adapter is a DoRA, which is not supported", "Train it as a plain LoRA.")
        given = (config.get("alpha_pattern") or {}).items()
        # transformers before 5 had one more level.
        patterns = {layer.removeprefix("text_model."): float(value) for layer, value in given}
        # peft takes regular expressions; a file from anybody must not bring one that runs forever.
        if odd := [layer for layer in patterns if not re.fullmatch(r"[\w.]+", layer)]:
            raise ModelUnavailable(f"the adapter's alpha_pattern {odd[0]} is not the plain name of a layer")
        alpha = float(config["lora_alpha"]) if "lora_alpha" in config else None
        return cls(alpha, patterns, bool(config.get("use_rslora")))

    def scale(self, name: str, rank: int, stored: torch.Tensor | None) -> float:
        """Returns alpha / rank (alpha / √rank when rank-stabilized); 1 where nothing tells the alpha."""
        alpha = float(rank) if self.alpha is None else self.alpha
        alpha = next((value for end, value in self.patterns.items() if f".{name}".endswith(f".{end}")), alpha)
        if stored is not None:
            alpha = float(stored)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_alphas(file: Path, metadata: dict[str, str], components: Iterable[str]) -> dict[str, Alphas]:
    """Reads peft's adapter_config.json beside the file, or diffusers' metadata inside it, for each component."""
    try:
        if (beside := file.with_name("adapter_config.json")).is_file():
            config = json.loads(beside.read_bytes())
            return {component: Alphas.of(config) for component in components}
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        prefixes = {component: f"{component}." for component in components}
        return {
            component: Alphas.of({name.removeprefix(p): value for name, value in config.items() if name.startswith(p)})
            for component, p in prefixes.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"the settings of the adapter {file.name} cannot be read") from error


def _delta(
    component: str,
    layer: str,
    roles: dict[str, torch.Tensor],
    layers: dict[str, tuple[str, Layer | Norm]],
    alphas: Alphas,
    strength: float,
) -> Delta:
    name, module = layers[layer]
    if isinstance(module, Norm):
        return _norm_delta(component, name, roles, module, strength)
    if "weight" in roles:
        raise ModelUnavailable(f"the adapter has all of {name}'s weight, not two factors", "Export it as a plain LoRA.")
    bias = _vector(name, roles["bias"], module.bias) if "bias" in roles else None
    if bias is not None:
        bias = strength * bias
    if not {"A", "B"} & roles.keys() and bias is not None:
        down, up = (torch.zeros(shape) for shape in ((0, *module.weight.shape[1:]), (len(bias), 0)))
        return LayerDelta(component, name, down, up, 1.0, bias)
    if not {"A", "B"} <= roles.keys():
        raise ModelUnavailable(f"the adapter has one of the two factors of {name} only", "The file is incomplete.")
    down, up = roles["A"], roles["B"]
    shape, rank = tuple(module.weight.shape), down.shape[0] if down.dim() else 0
    # A convolution's product is (out, rank) @ (rank, in·k·k): B must be 1×1.
    fits = up.shape[:2] == (shape[0], rank) and down.shape[1:].numel() == math.prod(shape[1:]) and up[0].numel() == rank
    if not rank or not fits:
        raise ModelUnavailable(
            f"the adapter's {name} is {tuple(up.shape)} @ {tuple(down.shape)}, the base's {shape}",
            "It was made for another base.",
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ModelUnavailable(f"the adapter's {name} has values that are not finite", "Train or export it again.")
    stored = roles.get("alpha")
    if stored is not None and stored.numel() != 1:
        raise ModelUnavailable(f"the adapter's {name} has an alpha that is not one number")
    scale = strength * alphas.scale(name, rank, stored)
    if not math.isfinite(scale):
        raise ModelUnavailable(f"the adapter's {name} has an alpha that is not finite")
    return LayerDelta(component, name, down, up, scale, bias)


def _norm_delta(component: str, name: str, roles: dict[str, torch.Tensor], norm: Norm, strength: float) -> NormDelta:
    if odd := sorted(roles.keys() - {"weight", "bias"}):
        raise ModelUnavailable(f"the adapter's {name} has {odd[0]}, and the base's is a norm", "Is it for this base?")
    weight, bias = (
        strength * _vector(name, roles[role], own) if role in roles else torch.zeros_like(own, device="cpu")
        for role, own in (("weight", norm.weight), ("bias", norm.bias))
    )
    return NormDelta(component, name, weight, bias)


def _vector(name: str, change: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Returns `change` if it can be added to the parameter `own` of the layer `name`."""
    if own is None or change.shape != own.shape:
        has = "none" if own is None else f"one of {tuple(own.shape)}"
        raise ModelUnavailable(
            f"the adapter changes {name} by {tuple(change.shape)} values, and the base has {has}",
            "It was made for another base.",
        )
    if not torch.isfinite(change).all():
        raise ModelUnavailable(f"the adapter's {name} has values that are not finite", "Train or export it again.")
    return change
