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
from api.engine.text2image import STABLE_DIFFUSION, read_index, samplers, size_step
from api.engine.weights import SAFETENSORS_HINT, read_header
from api.errors import InvalidRequest, ModelUnavailable, UnsupportedSize

INDEX = "model_index.json"  # of a whole model's folder
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
TENSOR_COMPONENTS = ("unet", "vae", "text_encoder", "safety_checker")
COMMIT = re.compile("[0-9a-f]{40}")
VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")
# A hub repository often holds each weight several times: pickles, half precision, whole files at the root, and other
# programs' folders.
CONFIG_FILES = ["*.json", "*/*.txt", "*/*.jinja"]
HUB_DUPLICATES = ["*.fp16[.-]*", "*.bf16[.-]*", "*.non_ema.*"]
USUAL_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class FoundBase:
    """A base on this disk: a diffusers folder, or a weight file and the folder with its shapes and tokenizer.

    `pipeline` is its class in diffusers; `samplers` are those that a request may name, None for any.
    """

    name: str
    path: Path
    config: Path | None = None
    size_step: int = 8
    pipeline: str = STABLE_DIFFUSION
    samplers: frozenset[str] | None = None

    def check_size(self, width: int, height: int) -> None:
        """Raises UnsupportedSize, naming the nearest size, when the model cannot draw `width` × `height` pixels."""
        step = self.size_step
        if width % step or height % step:
            nearest = " × ".join(str(max(256, min(1024, round(side / step) * step))) for side in (width, height))
            raise UnsupportedSize(
                f"this model draws widths and heights that are multiples of {step}, not {width} × {height}",
                f"The nearest size is {nearest}.",
            )

    def check_scheduler(self, name: str | None) -> None:
        """Raises InvalidRequest when the model cannot draw with the sampler that a request names.

        Refused, and not drawn with another: who names a sampler compares pictures, and would take these for its own.
        """
        if name is None or self.samplers is None or name in self.samplers:
            return
        others = f" It can draw with {', '.join(sorted(self.samplers))}." if self.samplers else ""
        raise InvalidRequest(
            f"this model cannot draw with the scheduler {name}", f"Leave it out: the model has its own.{others}"
        )

    def check_preset(self, name: str | None) -> None:
        """Raises InvalidRequest when a model of this kind has no such preset, whatever FAST_MODELS says."""
        if name is not None and self.pipeline != STABLE_DIFFUSION:
            raise InvalidRequest("presets are for Stable Diffusion 1 and 2, and this model is another", "Leave it out.")


def find_base(source: ModelSource, settings: Settings) -> FoundBase:
    """Returns the base on this disk; what is on the hub is downloaded first.

    Raises:
        ModelUnavailable: it is not there or not safetensors, or the hub cannot be reached or says no.
    """
    if source.hub_id is not None:
        return _in_folder(source.base, _fetch(*source.hub_id, settings))
    path = locate(source.base)
    if not path.exists():
        raise ModelUnavailable(f"{source.base} is not there", "Check its entry in USER_MODELS.")
    if path.is_dir():
        _refuse_lora(source, path)
        return _in_folder(source.base, path)
    read_header(path)  # before a configuration is fetched for what is no checkpoint
    config = _find_config(source, settings)
    return FoundBase(source.base, path, config, size_step(config))


def _in_folder(name: str, folder: Path) -> FoundBase:
    index = read_index(folder)
    fitting = None if index.pipeline == STABLE_DIFFUSION else samplers(folder, index)
    return FoundBase(name, folder, size_step=size_step(folder), pipeline=index.pipeline, samplers=fitting)


def _refuse_lora(source: ModelSource, folder: Path) -> None:
    if not (folder / INDEX).exists() and any((folder / name).is_file() for name in LORA_FILES):
        hint = f'Name the base that it is for: {{"base": "models/demo", "lora": "{source.base}"}}.'
        raise ModelUnavailable(f"{source.base} is a LoRA, not a whole model", hint)


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
    def snapshot(files: list[str]) -> Path:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_DUPLICATES, **access)
        )

    folder = snapshot(CONFIG_FILES)
    if with_weights:  # of what is going to be loaded, which is refused before gigabytes come
        folder = snapshot([f"{component}/*.safetensors" for component in read_index(folder).models])
    return folder


def count_values(path: Path) -> int:
    """Returns how many values the weights under `path` hold, from the headers of its files.

    Raises:
        ModelUnavailable: a file is not whole.
    """
    return _count([path]) if path.is_file() else sum(values_by_component(path).values())


def values_by_component(folder: Path) -> dict[str, int]:
    """Returns how many values the weights of each component hold, as `count_values` does."""
    return {name: _count(weight_files(folder / name)) for name in read_index(folder).models}


def _count(files: list[Path]) -> int:
    headers = (read_header(file) for file in files)
    shapes = (tensor["shape"] for header in headers for name, tensor in header.items() if name != "__metadata__")
    return sum(math.prod(shape) for shape in shapes)


def check_folder(folder: Path) -> dict[str, set[str]]:
    """Checks a diffusers folder without loading it; returns component → the names of its tensors.

    What is checked: the classes that it asks for, that it asks for no code, that each weight file is there and whole,
    and that each tokenizer is there.

    Raises:
        ModelUnavailable: the first thing that is wrong.
    """
    index = read_index(folder)
    for name in index.components:
        _refuse_code(folder, name)
    stored = {name: _stored(folder, name) for name in index.models}
    for name in index.text_readers:
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            # transformers makes an empty one: every prompt would read alike. It does not read SentencePiece's alone.
            hint = "Save it again with transformers and sentencepiece installed, which makes a tokenizer.json of it."
            raise ModelUnavailable(f"{folder.name}/{name} has neither tokenizer.json nor vocab.json", hint)
    return stored


def _refuse_code(folder: Path, component: str) -> None:
    """Refuses what transformers would follow out of the folder: code in it, or another model that it only changes."""
    for file in sorted((folder / component).glob("*config.json")):
        try:
            config = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelUnavailable(f"{folder.name} does not load: {component}/{file.name} cannot be read") from error
        if file.name == "adapter_config.json" or (isinstance(config, dict) and "auto_map" in config):
            raise ModelUnavailable(f"{folder.name}/{component} wants code or weights from elsewhere, which is refused")


def _stored(folder: Path, component: str) -> set[str]:
    """Returns the names of the tensors of a component, from the headers of its files."""
    files = weight_files(folder / component)
    if not files:
        raise ModelUnavailable(f"{folder.name}/{component} has no safetensors file", SAFETENSORS_HINT)
    if missing := _shards(folder, component) - {file.name for file in files}:
        raise ModelUnavailable(f"{folder.name}/{component} has no {min(missing)}", "Copy or download it again.")
    return set().union(*(read_header(file) for file in files))


def _shards(folder: Path, component: str) -> set[str]:
    """Returns the names of the files that a component's weights are said to lie in, if they are in several."""
    try:
        indices = [json.loads(file.read_bytes()) for file in (folder / component).glob("*.safetensors.index.json")]
        return {str(file) for index in indices for file in index["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{folder.name} does not load: {component}'s index cannot be read") from error
