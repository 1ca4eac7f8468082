"""A base without its weights: what a model over it, or one like it, has to fit.

It is built of the configuration that the operator chose, so nothing that a sent file says of itself counts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE as UNREAD_KEYS
from torch import Tensor
from transformers import PreTrainedModel

from api.engine.adapters import Layer, Norm
from api.engine.sources import FoundBase
from api.engine.text2image import STABLE_DIFFUSION, Index, read_index
from api.engine.weights import loading
from api.errors import InvalidRequest, ModelUnavailable

PARTS = ("unet", "vae", "text_encoder")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIDE = 32  # latents of a rehearsal
OTHER_BASE = "It was made for another base."
# Of a checkpoint's tensors these are for training, or are computed anew: nothing loads them.
SPARE = re.compile(
    r"model_ema\..+"
    r"|betas|logvar|scale_factor|lvlb_weights|(log_one_minus_|sqrt_(one_minus_|recip_|recipm1_)?)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|cond_stage_model\.(model\.)?logit_scale|([\w.]+\.)?embeddings\.position_ids"
)


@dataclass(frozen=True)
class Skeleton:
    """Modules on "meta", and what the base reads texts and takes its steps with."""

    index: Index
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    @classmethod
    def of(cls, found: FoundBase) -> "Skeleton":
        """Builds that of a base.

        Raises:
            InvalidRequest: it is no Stable Diffusion 1 or 2.
            ModelUnavailable: its configuration cannot be read.
        """
        folder = found.config or found.path
        index = read_index(folder)
        if index.pipeline != STABLE_DIFFUSION:
            hint = "Name a base that is Stable Diffusion 1 or 2."
            raise InvalidRequest(f"models over a {index.pipeline} are not taken", hint)
        with loading(found.name, folder):
            parts = {part: build(index.models[part], folder / part) for part in PARTS}
            return cls(index, **parts, **{name: read(index, folder, name) for name in ("tokenizer", "scheduler")})

    @property
    def layers(self) -> int:
        """How many layers a LoRA could change."""
        modules = (*self.unet.modules(), *self.text_encoder.modules())
        return sum(isinstance(module, Layer | Norm) for module in modules)

    def compare(self, part: str, found: Mapping[str, Tensor | None]) -> None:
        """Raises ModelUnavailable unless `found` has the tensors of that part, by name and shape, and no more."""
        expected: dict[str, Tensor] = getattr(self, part).state_dict()
        for name, tensor in expected.items():
            held = found.get(name)
            if held is None:
                raise ModelUnavailable(f"the model's {part} has no {name}", OTHER_BASE)
            if held.shape != tensor.shape:
                raise ModelUnavailable(
                    f"the model's {part} has a {name} of {tuple(held.shape)}, the base's is {tuple(tensor.shape)}",
                    OTHER_BASE,
                )
        if more := found.keys() - expected.keys():
            raise ModelUnavailable(f"the model's {part} has {min(more)}, which the base's has not", OTHER_BASE)


def build(kind: Any, folder: Path) -> Any:
    """Returns a model of the class, as it is configured in the folder, on "meta"."""
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        return kind.from_config(kind.load_config(folder, local_files_only=True))


def read(index: Index, folder: Path, name: str) -> Any:
    """Returns the tokenizer or the scheduler of a diffusers folder."""
    return index.components[name].from_pretrained(folder / name, local_files_only=True)


def rehearse(unet: Any, vae: Any, text_encoder: Any, length: int) -> None:
    """Runs each module on "meta", as a drawing does, over a text of `length` tokens; raises whatever they raise."""
    with torch.inference_mode():
        words = text_encoder(torch.zeros(1, length, dtype=torch.long, device="meta"))[0]
        latents = torch.empty(1, unet.config.in_channels, SIDE, SIDE, device="meta")
        noise = unet(latents, torch.zeros((), device="meta"), words, return_dict=False)[0]
        vae.decode(noise / vae.config.scaling_factor, return_dict=False)


def flat(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a text encoder by the names of transformers 5, which has a level less."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def read_shapes(opened: Any) -> dict[str, Tensor]:
    """Returns the tensors of an open file that count, by their keys: on "meta", in their shapes, without values.

    Raises:
        ModelUnavailable: the values of one are no floats, or of a kind that the CPU cannot look at.
    """
    entries = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    return {
        key: torch.empty(entry.get_shape(), dtype=float_of(key, entry.get_dtype()), device="meta")
        for key, entry in entries.items()
        if key not in UNREAD_KEYS and not SPARE.fullmatch(key)
    }


def float_of(key: str, dtype: str) -> torch.dtype:
    """Returns the type that a header names. Raises ModelUnavailable when it is none of FLOATS."""
    if dtype not in FLOATS:
        raise ModelUnavailable(f"{key} is of the type {dtype}", f"Export it as one of {', '.join(FLOATS)}.")
    return FLOATS[dtype]


def refuse_not_finite(opened: Any, keys: Iterable[str]) -> None:
    """Reads the tensors one at a time. Raises ModelUnavailable for the first that is not finite throughout."""
    for key in keys:
        if not torch.isfinite(opened.get_tensor(key)).all():
            raise ModelUnavailable(f"the model's {key} has values that are not finite", "Train or export it again.")
