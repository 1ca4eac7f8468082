"""What a model that somebody sent may be, and whether it is. Read in the process that `checkup` starts.

The readers that load models for drawing read it here too, over a base without weights: what passes loads there.
"""

import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders import single_file_utils as single_file
from safetensors import safe_open
from torch import Tensor

from api.engine.adapters import load_adapter
from api.engine.checkup import Checked
from api.engine.skeleton import OTHER_BASE, Skeleton, flat, float_of, read_shapes, refuse_not_finite
from api.engine.sources import LORA_FILES
from api.engine.unpacked import FILES, examine_model, list_files, refuse_no_file
from api.engine.weights import SAFETENSORS_HINT, loading, read_header
from api.errors import ModelUnavailable

LORA_FOLDER = {"": {*LORA_FILES, "adapter_config.json"}}
# Cut in three, or turned, where diffusers reads the text encoder of Stable Diffusion 2.
REMADE = re.compile(r"cond_stage_model\.model\.(text_projection|.+\.in_proj_(weight|bias))")


def examine(path: Path, base: Skeleton) -> Checked:
    """Returns what the model at `path` is, see `checkup.check_upload`.

    Raises:
        ModelUnavailable: the first reason to refuse it.
    """
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except OSError as error:
        raise ModelUnavailable(f"{path.name} cannot be read: {error.strerror}") from error
    if is_folder:
        return _examine_folder(path, base)
    refuse_no_file(path.name, path)
    if path.suffix != ".safetensors":  # diffusers would unpickle it
        raise ModelUnavailable(f"{path.name} is not named .safetensors", SAFETENSORS_HINT)
    header = read_header(path)
    is_whole = any(key.startswith(single_file.LDM_UNET_KEY) for key in header)
    return _examine_checkpoint(path, base) if is_whole else _examine_lora(path, header, base)


def _examine_folder(folder: Path, base: Skeleton) -> Checked:
    is_whole = (folder / "model_index.json").exists()
    files = list_files(folder, FILES if is_whole else LORA_FOLDER)
    size = sum(file.stat().st_size for file in files.values())
    if is_whole:
        examine_model(folder, base)
        return Checked("full", None, base.layers, size)
    weights = [file for name, file in files.items() if name in LORA_FILES]
    if len(weights) != 1:
        raise ModelUnavailable(f"{folder.name} has neither model_index.json nor one of {' and '.join(LORA_FILES)}")
    return replace(_examine_lora(weights[0], read_header(weights[0]), base), bytes=size)


def _examine_lora(file: Path, header: Mapping[str, Any], base: Skeleton) -> Checked:
    for key, entry in header.items():
        if key != "__metadata__" and not key.endswith(".alpha"):  # kohya's may be whole numbers
            float_of(key, entry["dtype"])
    deltas = load_adapter(file, base, strength=1.0).deltas
    return Checked("lora", max(delta.rank for delta in deltas), len(deltas), file.stat().st_size)


def _examine_checkpoint(file: Path, base: Skeleton) -> Checked:
    with loading(file.name, file), safe_open(file, framework="pt") as opened:
        stored = read_shapes(opened)
        converted: dict[str, dict[str, Tensor]] = {
            "unet": single_file.convert_ldm_unet_checkpoint(stored, config=base.unet.config),
            "vae": single_file.convert_ldm_vae_checkpoint(stored, config=base.vae.config),
            "text_encoder": _convert_text_encoder(stored, base),
        }
        for part, tensors in converted.items():
            base.compare(part, tensors)
        # Most tensors are handed on as they are, the rest as a view.
        used = {
            id(one) for tensors in converted.values() for tensor in tensors.values() for one in (tensor, tensor._base)
        }
        for key, tensor in stored.items():
            if id(tensor) not in used and not REMADE.fullmatch(key):
                raise ModelUnavailable(f"the model's key {key} has no counterpart in the base", OTHER_BASE)
        refuse_not_finite(opened, stored)
    return Checked("full", None, base.layers, file.stat().st_size)


def _convert_text_encoder(stored: dict[str, Tensor], base: Skeleton) -> dict[str, Tensor]:
    """Returns the tensors by their names in the base; chooses as diffusers' `create_diffusers_clip_model_from_ldm`."""
    made: dict[str, Tensor]
    if single_file.is_clip_model(stored):
        made = single_file.convert_ldm_clip_checkpoint(stored)
    elif single_file.is_open_clip_model(stored):
        made = single_file.convert_open_clip_checkpoint(base.text_encoder, stored)
        made.pop("text_projection.weight", None)  # the text encoder has no place for it
    else:
        raise ModelUnavailable("the model has no text encoder", OTHER_BASE)
    return flat(made)
