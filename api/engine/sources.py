"""Finding a base: a folder or file on this disk, or a hub id downloaded to it; checked before anything is loaded."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from api.config import ModelSource, Settings, locate
from api.engine.weights import SAFETENSORS_HINT, read_header
from api.errors import ModelUnavailable, UnsupportedSize

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
TENSOR_COMPONENTS = ("unet", "vae", "text_encoder", "safety_checker")
TRUSTED_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
COMMIT = re.compile("[0-9a-f]{40}")
VARIANT = re.compile(r"\.(fp16|bf16|non_ema)\.")
# A hub repository often holds each weight several times: pickles, half precision, and whole files at the root.
CONFIG_FILES = ["*.json", "*/*.txt"]
WEIGHT_FILES = ["*/*.safetensors"]
HUB_DUPLICATES = ["*.fp16.*", "*.bf16.*", "*.non_ema.*"]
USUAL_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class FoundBase:
    """A base on this disk: a diffusers folder, or a weight file and the folder with its shapes and tokenizer."""

    name: str
    path: Path
    config: Path | None = None
    size_step: int = 8

    def check_size(self, width: int, height: int) -> None:
        """Raises UnsupportedSize, naming the nearest size, when the model cannot draw `width` × `height` pixels."""
        step = self.size_step
        if width % step or height % step:
            nearest = " × ".join(str(max(256, min(1024, round(side / step) * step))) for side in (width, height))
            raise UnsupportedSize(
                f"this model draws widths and heights that are multiples of {step}, not {width} × {height}",
                f"The nearest size is {nearest}.",
            )


def find_base(source: ModelSource, settings: Settings) -> FoundBase:
    """Returns the base on this disk; what is on the hub is downloaded first.

    Raises:
        ModelUnavailable: it is not there or not safetensors, or the hub cannot be reached or says no.
    """
    if source.hub_id is not None:
        path = _fetch(*source.hub_id, settings)
        return FoundBase(source.base, path, size_step=_size_step(path))
    path = locate(source.base)
    if not path.exists():
        raise ModelUnavailable(f"{source.base} is not there", "Check its entry in USER_MODELS.")
    if path.is_dir():
        _refuse_lora(source, path)
        return FoundBase(source.base, path, size_step=_size_step(path))
    read_header(path)  # before a configuration is fetched for what is no checkpoint
    config = _find_config(source, settings)
    return FoundBase(source.base, path, config, _size_step(config))


def _refuse_lora(source: ModelSource, folder: Path) -> None:
    if not (folder / "model_index.json").exists() and any((folder / name).is_file() for name in LORA_FILES):
        hint = f'Name the base that it is for: {{"base": "models/demo", "lora": "{source.base}"}}.'
        raise ModelUnavailable(f"{source.base} is a LoRA, not a whole model", hint)


def _size_step(folder: Path) -> int:
    """Returns the pixels that one latent spans, by the autoencoder's levels; at least diffusers' own 8."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_bytes())
        return int(max(8, 2 ** (len(config["block_out_channels"]) - 1)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelUnavailable(f"{folder.name}/vae/config.json cannot be read") from error


def _find_config(source: ModelSource, settings: Settings) -> Path:
    """Returns the folder with what a checkpoint of weights alone lacks: as configured, else SD 1.5's from the hub."""
    if source.config is not None:
        return locate(source.config)
    try:
        return _fetch(USUAL_CONFIG, None, settings, with_weights=False)
    except ModelUnavailable as error:
        hint = 'Give the entry a "config": a diffusers folder of the same architecture, for its shapes and tokenizer.'
        raise ModelUnavailable(f"{source.base} needs a configuration: {error.detail}", hint) from error


def _fetch(name: str, revision: str | None, settings: Settings, *, with_weights: bool = True) -> Path:
    """Returns the folder of a repository of the hub: a whole model, or its configuration alone."""
    pinned = revision is not None and COMMIT.fullmatch(revision)
    if pinned and (found := _downloaded(name, revision, with_weights=with_weights)):
        return found
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    try:
        # Asked first because it gives up in time; the download alone would try again for half a minute.
        HfApi(token=token).model_info(name, revision=revision, timeout=settings.hub_timeout_seconds)
        return _snapshot(name, revision, with_weights, token=token)
    except GatedRepoError as error:
        hint = "Accept its terms on the hub and set HF_TOKEN."
        raise ModelUnavailable(f"{name} asks for permission", hint) from error
    except RevisionNotFoundError as error:
        raise ModelUnavailable(f"{name} has no revision {revision}", "Pin a commit that exists.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        hint = "Check the name in USER_MODELS; for a private model set HF_TOKEN."
        raise ModelUnavailable(f"there is no folder {name}, and the hub has no model {name}", hint) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        if found := _downloaded(name, revision, with_weights=with_weights):
            return found
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise ModelUnavailable(f"the hub refuses to hand out {name}", "Check HF_TOKEN.") from error
        hint = "Check the network, or download the model and put its folder in USER_MODELS."
        raise ModelUnavailable(f"there is no folder {name}, and the hub cannot be reached", hint) from error


def weight_files(component: Path) -> list[Path]:
    """Returns the weight files of a component's folder, half-precision and other variants left out."""
    return [file for file in sorted(component.glob("*.safetensors")) if not VARIANT.search(file.name)]


def is_downloaded(source: ModelSource) -> bool:
    """Whether the base is on this disk already."""
    return source.hub_id is None or _downloaded(*source.hub_id) is not None


def _downloaded(name: str, revision: str | None, *, with_weights: bool = True) -> Path | None:
    """Returns the snapshot on this disk, if it is whole: an interrupted download leaves a part of one."""
    try:
        folder = _snapshot(name, revision, with_weights, local_files_only=True)
        if with_weights:
            check_folder(folder)
    except (LocalEntryNotFoundError, ModelUnavailable):
        return None
    return folder


def _snapshot(name: str, revision: str | None, with_weights: bool, **access: Any) -> Path:
    files = [*CONFIG_FILES, *WEIGHT_FILES] if with_weights else CONFIG_FILES
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_DUPLICATES, **access)
    )


def count_values(path: Path) -> int:
    """Returns how many values the weights under `path` hold, from the headers of its files.

    Raises:
        ModelUnavailable: a file is not whole.
    """
    files = [path] if path.is_file() else [file for name in TENSOR_COMPONENTS for file in weight_files(path / name)]
    headers = (read_header(file) for file in files)
    shapes = (tensor["shape"] for header in headers for name, tensor in header.items() if name != "__metadata__")
    return sum(math.prod(shape) for shape in shapes)


def check_folder(folder: Path) -> dict[str, set[str]]:
    """Checks a diffusers folder without loading it; returns component → the names of its tensors.

    What is checked: the classes that it asks for, that each weight file is whole, and that a tokenizer is there.

    Raises:
        ModelUnavailable: the first thing that is wrong.
    """
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_bytes())
        components = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
        pipeline_class, libraries = index["_class_name"], {part[0] for part in components.values()}
    except FileNotFoundError as error:
        raise ModelUnavailable(f"{folder.name} has no model_index.json: it is not a diffusers folder") from error
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{folder.name}/model_index.json cannot be read") from error
    if pipeline_class != "StableDiffusionPipeline":
        raise ModelUnavailable(f"{folder.name} is a {pipeline_class}", "StableDiffusionPipeline models are supported.")
    if foreign := libraries - TRUSTED_LIBRARIES:
        raise ModelUnavailable(f"{folder.name} wants code from {min(map(str, foreign))}, which is refused")
    stored: dict[str, set[str]] = {}
    for name in TENSOR_COMPONENTS:
        if name not in components:
            continue
        headers = [read_header(file) for file in weight_files(folder / name)]
        if not headers:
            raise ModelUnavailable(f"{folder.name}/{name} has no safetensors file", SAFETENSORS_HINT)
        stored[name] = set().union(*headers)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not (tokenizer / "vocab.json").is_file():
        # transformers makes an empty one: every prompt would read alike.
        raise ModelUnavailable(f"{folder.name}/tokenizer has neither tokenizer.json nor vocab.json")
    return stored
