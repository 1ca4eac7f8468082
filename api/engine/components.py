"""Loading a base: a diffusers folder, hub id or single file becomes a pipeline on the device, or a clear error."""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from api.config import ModelSource, Settings, locate
from api.engine.sources import TENSOR_COMPONENTS, check_folder, weight_files
from api.engine.weights import TensorPool, is_out_of_memory, read_header
from api.errors import ModelUnavailable, SitterError

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


def size_step(pipeline: StableDiffusionPipeline) -> int:
    """Returns the number of pixels that width and height must be a multiple of (at least diffusers' own 8)."""
    return max(8, int(pipeline.vae_scale_factor))
