"""What a diffusers folder is: which text-to-image pipeline, made of which classes, and what it can be asked for.

Read from its configuration alone, before a weight is loaded. Stable Diffusion has lanes of its own; the others of
diffusers' own text-to-image pipelines are drawn by their own call, see `stock`.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import diffusers
import transformers
from diffusers.utils import _maybe_remap_transformers_class as today_name
from torch import nn

from api.config import Scheduler
from api.engine.sampler import SAMPLERS
from api.errors import ModelUnavailable

STABLE_DIFFUSION = "StableDiffusionPipeline"
KNOWN = f"{STABLE_DIFFUSION}, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline"
TRUSTED_LIBRARIES = {
    "diffusers": diffusers,
    "transformers": transformers,
    "stable_diffusion": diffusers.pipelines.stable_diffusion,  # its safety checker
}
# What a component may be. A pipeline inside of a pipeline, for one, would be loaded by rules of its own.
COMPONENTS = (
    diffusers.ModelMixin,
    diffusers.SchedulerMixin,
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.ProcessorMixin,
    transformers.FeatureExtractionMixin,
    transformers.ImageProcessingMixin,
)
READS_TEXT = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
# What the call must take: a user's request has no picture to begin with, and its progress is watched.
ASKED_FOR = {"prompt", "width", "height", "num_inference_steps", "num_images_per_prompt", "generator", "output_type"}
STEP_CALLBACKS = {"callback_on_step_end", "callback"}
MORE_THAN_TEXT = {"controlnet", "control_image", "pag_applied_layers"}
INDISPENSABLE = {"unet", "transformer", "vae", "scheduler"}
LEAST_FACTOR = 8
COMPRESSES_DEEPLY = 32  # such an autoencoder leaves nothing to be cut into patches


@dataclass(frozen=True)
class Index:
    """What model_index.json says: the pipeline's class, and those of its components; None for one that it lacks."""

    pipeline: str
    kind: Any
    components: Mapping[str, Any]

    @property
    def models(self) -> dict[str, Any]:
        """Returns the components that have weights."""
        return {name: kind for name, kind in self.components.items() if kind and issubclass(kind, nn.Module)}

    @property
    def text_readers(self) -> list[str]:
        """Returns the components that make tokens of a text."""
        return [name for name, kind in self.components.items() if kind and issubclass(kind, READS_TEXT)]

    @property
    def absent(self) -> list[str]:
        """Returns the components that others of its kind have, as the largest text encoder of Stable Diffusion 3."""
        return [name for name, kind in self.components.items() if kind is None]


def read_index(folder: Path) -> Index:
    """Returns what the diffusers folder says that it is.

    Raises:
        ModelUnavailable: it says nothing that can be read, is no text-to-image pipeline of diffusers itself, or wants
            classes from elsewhere.
    """
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_bytes())
        name = index["_class_name"]
    except FileNotFoundError as error:
        raise ModelUnavailable(f"{folder.name} has no model_index.json: it is not a diffusers folder") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelUnavailable(f"{folder.name}/model_index.json cannot be read") from error
    kind = diffusers.StableDiffusionPipeline if name == STABLE_DIFFUSION else _others().get(str(name))
    if kind is None:
        hint = f"diffusers' own text-to-image pipelines are supported, as {KNOWN}."
        raise ModelUnavailable(f"{folder.name} is a {name}", hint)
    return Index(name, kind, _components(folder, index, kind))


@cache
def _others() -> dict[str, Any]:
    """Returns the pipelines of diffusers that make a picture of a text and of nothing else, by name."""
    # Imported late: half a second and 20 MB, which Stable Diffusion does without.
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as KINDS

    drawable = {}
    for kind in KINDS.values():
        parts, call = parameters_of(kind.__init__), parameters_of(kind.__call__)
        watched = call.keys() >= ASKED_FOR and STEP_CALLBACKS & call.keys()
        if watched and "vae" in parts and not MORE_THAN_TEXT & (parts.keys() | call.keys()):
            drawable[kind.__name__] = kind
    return drawable


@cache
def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """Returns what a function of diffusers can be given."""
    return inspect.signature(function).parameters


def _components(folder: Path, index: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    components: dict[str, Any] = {}
    for name, parameter in parameters_of(kind.__init__).items():
        is_optional = name in kind._optional_components
        if name == "self" or (parameter.default is not inspect.Parameter.empty and not is_optional):
            continue  # a setting
        match index.get(name):
            case [str(library), str(class_name)]:
                components[name] = _component(folder, library, class_name)
            case None | [None, None] if name in INDISPENSABLE:
                raise ModelUnavailable(f"{folder.name} has no {name}")
            case None | [None, None]:
                components |= {} if is_optional else {name: None}
            case other:
                raise ModelUnavailable(f"{folder.name}/model_index.json cannot be read: its {name} is {other}")
    return components


def _component(folder: Path, library: str, class_name: str) -> Any:
    if library not in TRUSTED_LIBRARIES:
        raise ModelUnavailable(f"{folder.name} wants code from {library}, which is refused")
    try:
        kind = getattr(TRUSTED_LIBRARIES[library], today_name(class_name) or class_name)
        if not issubclass(kind, COMPONENTS):
            raise TypeError(kind)
    except (AttributeError, ImportError, TypeError) as error:
        hint = "It is of another version, or needs a library that is not installed, as torchvision."
        raise ModelUnavailable(f"{folder.name} does not load: {library} has no component {class_name}", hint) from error
    return kind


def size_step(folder: Path) -> int:
    """Returns the pixels that a width and a height are multiples of.

    They are what one latent spans, by the autoencoder's levels and at least diffusers' own 8; twice that where a
    transformer draws, which reads the latents in patches of 2 × 2.
    """
    try:
        config = json.loads((folder / "vae" / "config.json").read_bytes())
        factor: int = max(LEAST_FACTOR, 2 ** _halvings(config))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelUnavailable(f"{folder.name}/vae/config.json cannot be read") from error
    return factor * 2 if (folder / "transformer").is_dir() and factor < COMPRESSES_DEEPLY else factor


def _halvings(config: dict[str, Any]) -> int:
    """Returns how often the autoencoder halves the sides of a picture."""
    for levels in ("block_out_channels", "encoder_block_out_channels"):
        if levels in config:
            return len(config[levels]) - 1
    return len(config["temperal_downsample"])  # Qwen-Image's and Wan's, who spell it so


def samplers(folder: Path, index: Index) -> frozenset[str]:
    """Returns the names of a request's schedulers that the pipeline can draw with."""
    own = index.components["scheduler"]
    try:
        flows = own.load_config(folder / "scheduler").get("prediction_type") == "flow_prediction"
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{folder.name}/scheduler/scheduler_config.json cannot be read") from error
    if own is diffusers.FlowMatchEulerDiscreteScheduler:
        return frozenset({"euler"})  # which is what it does
    # The samplers that a request can name know nothing of flow matching, nor of consistency models' own schedule.
    alone = flows or "original_inference_steps" in parameters_of(index.kind.__call__)
    fitting = {own} if alone else {own, *own().compatibles}
    return frozenset(name for name in get_args(Scheduler) if SAMPLERS[name] in fitting)
