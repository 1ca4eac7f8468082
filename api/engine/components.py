"""Loading a base: a diffusers folder, hub id or single file becomes a pipeline on the device, or a clear error."""

import json
import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from diffusers import StableDiffusionPipeline
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
from api.engine.weights import SAFETENSORS_HINT, TensorPool, is_out_of_memory, read_header
from api.errors import ModelUnavailable, SitterError

TENSOR_COMPONENTS = ("unet", "vae", "text_encoder", "safety_checker")
COMMIT = re.compile("[0-9a-f]{40}")
VARIANT = re.compile(r"\.(fp16|bf16|non_ema)\.")
TRUSTED_LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}
# A hub repository often holds each weight several times: pickles, half precision, and whole files at the root.
HUB_FILES = ["*.json", "*/*.txt", "*/*.safetensors"]
HUB_DUPLICATES = ["*.fp16.*", "*.bf16.*", "*.non_ema.*"]

# While they load, diffusers, transformers and accelerate change torch itself (`nn.Module.register_parameter`,
# the initialisers, the default dtype): two loads at once leave weights on "meta", in this model or the next.
_ONE_LOAD = threading.Lock()


@dataclass(frozen=True)
class Placement:
    """Where models live and in which precision."""

    device: str
    dtype: torch.dtype


def choose_placement(settings: Settings) -> Placement:
    """Returns the best device that the settings allow: CUDA, Apple MPS, then the CPU."""
    device = "cpu"
    if settings.use_gpu and torch.cuda.is_available():
        device = "cuda"
    elif settings.use_gpu and torch.backends.mps.is_available():
        device = "mps"
    automatic = torch.float32 if device == "cpu" else torch.float16
    dtype = automatic if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return Placement(device, dtype)


def find_folder(source: ModelSource, settings: Settings) -> Path:
    """Returns the folder or file of the base on this disk; a hub id is downloaded first.

    Raises:
        ModelUnavailable: it is not there, or the hub cannot be reached or says no.
    """
    if source.hub_id is None:
        path = locate(source.base)
        if not path.exists():
            raise ModelUnavailable(f"{source.base} is not there", "Check USER_MODELS in api/config.py.")
        return path
    name, revision = source.hub_id
    pinned = revision is not None and COMMIT.fullmatch(revision)
    if pinned and (found := _downloaded(name, revision)):
        return found
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    try:
        # Asked first because it gives up in time; the download alone would try again for half a minute.
        HfApi(token=token).model_info(name, revision=revision, timeout=settings.hub_timeout_seconds)
        return Path(
            snapshot_download(
                name, revision=revision, token=token, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES
            )
        )
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{name} asks for permission", "Accept its terms on the hub and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelUnavailable(f"{name} has no revision {revision}", "Pin a commit that exists.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        hint = "Check the name in USER_MODELS; for a private model set HF_TOKEN."
        raise ModelUnavailable(f"there is no folder {source.base}, and the hub has no model {name}", hint) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        if found := _downloaded(name, revision):
            return found
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise ModelUnavailable(f"the hub refuses to hand out {name}", "Check HF_TOKEN.") from error
        hint = "Check the network, or download the model and put its folder in USER_MODELS."
        raise ModelUnavailable(f"there is no folder {source.base}, and the hub cannot be reached", hint) from error


def weight_files(component: Path) -> list[Path]:
    """Returns the weight files of a component's folder, half-precision and other variants left out."""
    return [file for file in sorted(component.glob("*.safetensors")) if not VARIANT.search(file.name)]


def is_downloaded(source: ModelSource) -> bool:
    """Whether the base is on this disk already."""
    return source.hub_id is None or _downloaded(*source.hub_id) is not None


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Returns the snapshot on this disk, if it is whole: an interrupted download leaves a part of one."""
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_DUPLICATES,
            )
        )
        check_folder(folder)
    except (LocalEntryNotFoundError, ModelUnavailable):
        return None
    return folder


def expected_bytes(path: Path, dtype: torch.dtype) -> int:
    """Returns the bytes that the weights under `path` take in `dtype`, from the headers of its files.

    Raises:
        ModelUnavailable: a file is not whole.
    """
    files = [path] if path.is_file() else [file for name in TENSOR_COMPONENTS for file in weight_files(path / name)]
    headers = (read_header(file) for file in files)
    shapes = (tensor["shape"] for header in headers for name, tensor in header.items() if name != "__metadata__")
    values: int = sum(math.prod(shape) for shape in shapes)
    return values * dtype.itemsize


def load_pipeline(source: ModelSource, path: Path, placement: Placement, pool: TensorPool) -> StableDiffusionPipeline:
    """Returns the pipeline at `path` on the device, ready to draw; tensors that others hold already are shared.

    Raises:
        ModelUnavailable: a file is missing, corrupt, a pickle, or of a pipeline that is not supported.
    """
    try:
        with _ONE_LOAD:
            if path.is_file():
                pipeline = _load_single_file(source, path, placement.dtype)
            else:
                pipeline = _load_folder(path, placement.dtype)
            _make_ready(pipeline, placement.device, pool)
    except SitterError:
        raise
    except Exception as error:  # whatever a library makes of a broken model is one thing to the caller
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailable(f"{source.base} does not load: {reason}") from error
    return pipeline


def _make_ready(pipeline: StableDiffusionPipeline, device: str, pool: TensorPool) -> None:
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # several pictures are decoded one by one: the decoder's peak stays that of one
    for name in TENSOR_COMPONENTS:
        if (module := getattr(pipeline, name)) is not None:
            module.requires_grad_(False).eval()
            pool.share(name, module)
    pipeline.tokenizer = pool.share_tokenizer(pipeline.tokenizer)


def _load_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    check_folder(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    # What a file lacks, diffusers reports; transformers draws it at random.
    stored = {name for file in weight_files(folder / "text_encoder") for name in read_header(file)}
    lacking = {_flat_name(name) for name, _ in pipeline.text_encoder.named_parameters()} - set(map(_flat_name, stored))
    if lacking:
        raise ModelUnavailable(f"{folder.name}/text_encoder has no {min(lacking)}", "Copy or download it again.")
    return pipeline


def _flat_name(name: str) -> str:
    # Files of transformers before 5 have one more level.
    return name.removeprefix("text_model.")


def _load_single_file(source: ModelSource, file: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    read_header(file)
    # A checkpoint holds weights only. The shapes and the tokenizer come from `config`, else from the hub's SD 1.5.
    config = {"config": str(locate(source.config)), "local_files_only": True} if source.config else {}
    try:
        return StableDiffusionPipeline.from_single_file(str(file), dtype=dtype, **config)
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        hint = 'Give the entry a "config": a diffusers folder of the same architecture, for its shapes and tokenizer.'
        raise ModelUnavailable(
            f"{source.base} needs a configuration from the hub, which cannot be reached", hint
        ) from error


def check_folder(folder: Path) -> None:
    """Checks a diffusers folder without loading it: its classes, and that each weight file is whole.

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
    for name in TENSOR_COMPONENTS:
        if name not in components:
            continue
        weights = weight_files(folder / name)
        if not weights:
            raise ModelUnavailable(f"{folder.name}/{name} has no safetensors file", SAFETENSORS_HINT)
        for file in weights:
            read_header(file)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not (tokenizer / "vocab.json").is_file():
        # transformers makes an empty one: every prompt would read alike.
        raise ModelUnavailable(f"{folder.name}/tokenizer has neither tokenizer.json nor vocab.json")


def size_step(pipeline: StableDiffusionPipeline) -> int:
    """Returns the number of pixels that width and height must be a multiple of (at least diffusers' own 8)."""
    return max(8, int(pipeline.vae_scale_factor))
