"""Where models come from: a folder, a file, an id of the hub, and what is drawn on top."""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: relative model paths start here."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


Scheduler = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"]


class FastSource(BaseModel):
    """What a base draws with in few steps, on top of whichever model of a user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora: str | None = Field(default=None, min_length=1, description="few-step LoRA (LCM, Hyper-SD…) over the base")
    decoder: str | None = Field(default=None, min_length=1, description="diffusers folder of a tiny autoencoder")
    scheduler: Scheduler | None = Field(default="lcm", description="sampler that it was distilled for")
    num_inference_steps: int = Field(default=4, ge=1, le=150, description="denoising steps")
    guidance_scale: float = Field(default=1.0, ge=1.0, le=20.0, allow_inf_nan=False, description="guidance")


class ModelSource(BaseModel):
    """Where a user's model comes from: a base, and optionally a LoRA adapter over it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(min_length=1, description="diffusers folder, hub id (`name/model@revision`) or .safetensors file")
    lora: str | None = Field(default=None, min_length=1, description="LoRA folder or .safetensors file over the base")
    config: str | None = Field(
        default=None,
        min_length=1,
        description="for a .safetensors base: diffusers folder with its shapes and tokenizer",
    )
    lora_scale: float = Field(default=1.0, ge=-2.0, le=2.0, allow_inf_nan=False, description="strength of the LoRA")
    delta: str | None = Field(
        default=None,
        min_length=1,
        description="file that `sitter delta` made of the base: drawn in its place, in a step with others",
    )

    @model_validator(mode="after")
    def _delta_of_a_whole_model(self) -> Self:
        if self.delta is not None and self.lora is not None:
            raise ValueError("a delta stands for a whole model: give this one no lora besides")
        return self

    def __str__(self) -> str:
        return self.model_id

    @property
    def model_id(self) -> str:
        """The name the API answers with: the adapter's where there is one, else the base's."""
        return self.lora or self.base

    def without_lora(self) -> "ModelSource":
        """Returns the base alone: what users with different adapters share."""
        return self if self.lora is None else ModelSource(base=self.base, config=self.config)

    def itself(self) -> Self:
        """Returns the model without what may be drawn in its place."""
        return self if self.delta is None else self.model_copy(update={"delta": None})

    @property
    def hub_id(self) -> tuple[str, str | None] | None:
        """`(repository, revision)` when the base is not on this disk but looks like a hub id.

        A path into a folder of the checkout is none: `models/demmo` is a slip of the pen, not somebody's repository.
        """
        name, _, revision = self.base.partition("@")
        if locate(name.split("/")[0]).is_dir() or not HUB_ID.fullmatch(name) or name.endswith(".safetensors"):
            return None
        return name, revision or None


def locate(path: str | Path) -> Path:
    """Returns `path` as an absolute path; a relative one starts at the checkout."""
    return (ROOT / Path(path).expanduser()).absolute()


def _as_source(value: Any) -> Any:
    if isinstance(value, str):
        return {"base": value}
    return dict(value) if isinstance(value, MappingProxyType) else value


Source = Annotated[ModelSource, BeforeValidator(_as_source)]
