"""Loading a base: a diffusers folder, hub id or single file becomes a pipeline on the device, or a clear error."""

import json
import threading
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from api.config import Settings
from api.engine.sources import TENSOR_COMPONENTS, FoundBase, check_folder
from api.engine.text2image import read_index
from api.engine.weights import TensorPool, loading, read_header
from api.errors import ModelUnavailable

# While they load, diffusers, transformers and accelerate change torch itself (`nn.Module.register_parameter`,
# the initialisers, the default dtype): two loads at once leave weights on "meta", in this model or the next.
ONE_LOAD = threading.Lock()
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # for the Auto classes of transformers, which would ask a person


@dataclass(frozen=True)
class Placement:
    """Where models live and in which precision: `dtype`, but the decoder in `vae_dtype`.

    A pipeline that is not Stable Diffusion's hands latents to its decoder as they are, so that all of it has one
    precision: `stock_dtype`, or `dtype` where that is None.
    """

    device: str
    dtype: torch.dtype
    vae_dtype: torch.dtype
    stock_dtype: torch.dtype | None = None

    @property
    def one_dtype(self) -> torch.dtype:
        """The precision of a pipeline that has but one."""
        return self.stock_dtype or self.dtype


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
        # Most other models were trained in bfloat16, and leave the range of float16.
        bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(device, torch.float16, torch.float16, torch.bfloat16 if bfloat16 else None)
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
    with loading(found.name, found.path), ONE_LOAD:
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


def load_decoder(folder: Path, placement: Placement) -> AutoencoderTiny:
    """Returns the tiny autoencoder in `folder`, on the device, in the precision of decoders.

    Raises:
        ModelUnavailable: a file is missing, corrupt, a pickle, or of another kind.
    """
    with loading(folder.name, folder), ONE_LOAD:
        config = folder / "config.json"
        if not config.is_file() or json.loads(config.read_bytes()).get("_class_name") != "AutoencoderTiny":
            raise ModelUnavailable(f"{folder.name} is no AutoencoderTiny", "Check FAST_MODELS.")
        decoder, report = AutoencoderTiny.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if lacking := sorted(report["missing_keys"]):
            raise ModelUnavailable(f"{folder.name} has no {lacking[0]}", "Copy or download it again.")
        decoder.requires_grad_(False).eval().to(placement.device, placement.vae_dtype)
        return decoder.to(memory_format=torch.channels_last)


def load_stock(found: FoundBase, placement: Placement, pool: TensorPool) -> DiffusionPipeline:
    """Returns a pipeline of any other kind than Stable Diffusion's, as `load_pipeline` does.

    Its models come one after the other, so that one of them at a time is in memory in float32.
    """
    with loading(found.name, found.path), ONE_LOAD:
        check_folder(found.path)
        index = read_index(found.path)
        models: dict[str, Any] = {}
        for name, kind in index.models.items():
            models[name] = load_model(kind, found.path / name)
            _place(models[name], placement)
            pool.share(name, models[name])
        pipeline = index.kind.from_pretrained(
            found.path, **models, **dict.fromkeys(index.absent), use_safetensors=True, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline.vae, "enable_slicing"):
        pipeline.vae.enable_slicing()  # as in Stable Diffusion's
    return pipeline


def load_model(kind: Any, folder: Path, **how: Any) -> nn.Module:
    """Returns a model of diffusers or transformers in float32, on the host; under ONE_LOAD.

    Raises:
        ModelUnavailable: its file lacks weights.
        Exception: whatever the library says of a file that is missing, corrupt or a pickle.
    """
    model: nn.Module
    model, told = kind.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True, **how
    )
    if told["missing_keys"]:  # drawn at random
        raise ModelUnavailable(
            f"{folder.parent.name}/{folder.name} has no {min(told['missing_keys'])}", "Copy or download it again."
        )
    return model


def _place(model: Any, placement: Placement) -> None:
    """Moves a model to its device, in the precision that a load in that precision gives each of its tensors.

    That is not what `to` does: tables that are computed and not stored stay as exact as they are, and so do layers of
    which the model says that they must.
    """
    dtype, stored = placement.one_dtype, model.state_dict().keys()
    exact = set(model._keep_in_fp32_modules or ())
    if isinstance(model, PreTrainedModel):  # whose plain list is for float16 alone
        exact = (exact if dtype == torch.float16 else set()) | set(model._keep_in_fp32_modules_strict or ())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        must_stay = any(f".{part}." in f".{name}." for part in exact)
        if name in stored and tensor.is_floating_point() and not must_stay:
            tensor.data = tensor.data.to(dtype)
    model.requires_grad_(False).eval().to(placement.device)
