"""Loading a base: a diffusers folder, hub id or single file becomes a pipeline on the device, or a clear error."""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from api.config import Settings
from api.engine.sources import TENSOR_COMPONENTS, FoundBase, check_folder
from api.engine.weights import TensorPool, loading, read_header
from api.errors import ModelUnavailable

# While they load, diffusers, transformers and accelerate change torch itself (`nn.Module.register_parameter`,
# the initialisers, the default dtype): two loads at once leave weights on "meta", in this model or the next.
_ONE_LOAD = threading.Lock()


@dataclass(frozen=True)
class Placement:
    """Where models live and in which precision: `dtype`, but the decoder in `vae_dtype`."""

    device: str
    dtype: torch.dtype
    vae_dtype: torch.dtype


def choose_placement(settings: Settings) -> Placement:
    """Returns the best device that the settings allow: CUDA, Apple MPS, then the CPU."""
    device = "cpu"
    if settings.use_gpu and torch.cuda.is_available():
        device = "cuda"
    elif settings.use_gpu and torch.backends.mps.is_available():
        device = "mps"
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        return Placement(device, dtype, dtype)
    if device != "cpu":
        return Placement(device, torch.float16, torch.float16)
    # The sampler's sums are float32 all the same: of the bundled model's pictures as many are as asked for. Its decoder
    # is left alone, as bfloat16 moves smooth colours by eight levels of 255.
    return Placement(device, torch.bfloat16 if _multiplies_bfloat16() else torch.float32, torch.float32)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without, bfloat16 is slower than float32."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def load_pipeline(found: FoundBase, placement: Placement, pool: TensorPool) -> StableDiffusionPipeline:
    """Returns the pipeline of `found` on the device, ready to draw; tensors that others hold already are shared.

    Raises:
        ModelUnavailable: a file is missing, corrupt, a pickle, or of a pipeline that is not supported.
    """
    with loading(found.name, found.path), _ONE_LOAD:
        pipeline = _load_folder(found.path) if found.config is None else _load_file(found.path, found.config)
        _make_ready(pipeline, placement, pool)
    return pipeline


# Both load in float32 and convert after: a load in another precision makes that torch's default meanwhile, also
# for whoever draws.


def _load_folder(folder: Path) -> StableDiffusionPipeline:
    stored = check_folder(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    # What a file lacks, diffusers reports; transformers draws it at random.
    expected = {_flat_name(name) for name, _ in pipeline.text_encoder.named_parameters()}
    lacking = expected - set(map(_flat_name, stored["text_encoder"]))
    if lacking:
        raise ModelUnavailable(f"{folder.name}/text_encoder has no {min(lacking)}", "Copy or download it again.")
    return pipeline


def _flat_name(name: str) -> str:
    # Files of transformers before 5 have one more level.
    return name.removeprefix("text_model.")


def _load_file(file: Path, config: Path) -> StableDiffusionPipeline:
    read_header(file)  # diffusers would unpickle what has another ending than .safetensors
    return StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), dtype=torch.float32, local_files_only=True
    )


def _make_ready(pipeline: StableDiffusionPipeline, placement: Placement, pool: TensorPool) -> None:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # several pictures are decoded one by one: the decoder's peak stays that of one
    for name in TENSOR_COMPONENTS:
        if (module := getattr(pipeline, name)) is not None:
            dtype = placement.vae_dtype if name == "vae" else placement.dtype
            module.requires_grad_(False).eval().to(placement.device, dtype)
            module.to(memory_format=torch.channels_last)  # convolutions read it faster, the decoder's by a third
            pool.share(name, module)
    pipeline.tokenizer = pool.share_tokenizer(pipeline.tokenizer)
