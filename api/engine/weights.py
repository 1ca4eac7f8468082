"""Weights: safetensors files checked before they are opened, and tensors that are equal held once."""

import copy
import errno
import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from api.errors import ModelUnavailable, SitterError
from api.whole import whole_file

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # what safetensors says of one
NOTE = "sitter_note"  # in the metadata of what `save_whole` writes
Module = TypeVar("Module", bound=nn.Module)

MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 10_000
FINGERPRINT_VALUES = 64
# What PyTorch says in a plain RuntimeError: its CPU and Apple allocators, and CUDA's libraries.
OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "backend out of memory",
    "error: out of memory",  # of page-locked memory
    "_STATUS_ALLOC_FAILED",
)
SAFETENSORS_HINT = (
    "Only safetensors are loaded, never pickles (.bin, .ckpt, .pt). Save the model again as .safetensors."
)


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: name → {dtype, shape, data_offsets}, and `__metadata__`.

    Reads the header alone, so a file of any size is judged in milliseconds. Format:
    https://github.com/huggingface/safetensors#format

    Raises:
        ModelUnavailable: the file is missing, cut short, not safetensors (whatever its name says), or has a
            header over 2 MB or more than 10,000 tensors.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelUnavailable(f"{path.name} is not a safetensors file, or was cut short", SAFETENSORS_HINT)
            header = json.loads(file.read(length))
            ends = [_end_of(entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{path.name} is not a safetensors file", SAFETENSORS_HINT) from error
    except OSError as error:
        raise ModelUnavailable(f"{path.name} cannot be read: {error.strerror}") from error
    if len(ends) > MAX_TENSORS:
        raise ModelUnavailable(f"{path.name} has {len(ends)} tensors, over the limit of {MAX_TENSORS}")
    missing = max(ends, default=0) - (size - 8 - length)
    if missing > 0:
        raise ModelUnavailable(f"{path.name} was cut short: {missing} bytes are missing", "Copy or download it again.")
    return dict(header)


def _end_of(entry: Any) -> int:
    """Returns where the data of a header's entry ends. Raises ValueError when it describes no tensor."""
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if 0 <= begin <= end and all(isinstance(side, int) and side >= 0 for side in shape):
                return end
    raise ValueError("not a tensor")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room, on the GPU or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def loading(name: str, path: Path, hint: str | None = None) -> Iterator[None]:
    """Makes one error of whatever a library raises in the block over the files at `path`, which people call `name`.

    Raises:
        ModelUnavailable: with the first line of what the library said, the place of the files on this disk left out.
            An error of ours, and one for want of memory, stays what it is.
    """
    try:
        yield
    except SitterError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = str(error).strip() or type(error).__name__
        reason = said.splitlines()[0].replace(f"{path.parent}/", "")
        raise ModelUnavailable(f"{name} does not load: {reason}", hint) from error


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields every parameter and buffer of `module`."""
    yield from module.parameters()
    yield from module.buffers()


def shell(module: Module) -> Module:
    """Returns a copy of `module` that may be built into something else; its tensors are those of `module` itself."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors_of(module)})


def storages_of(tensors: Iterator[torch.Tensor]) -> dict[Hashable, tuple[str, int]]:
    """Returns the distinct storages behind `tensors`: identity → (device type, bytes)."""
    storages = ((tensor.device.type, tensor.untyped_storage()) for tensor in tensors)
    return {(device, storage.data_ptr()): (device, storage.nbytes()) for device, storage in storages}


class TensorPool:
    """Finds parameters and tokenizers that some loaded model holds already, so that each is held once.

    It keeps nothing alive: what no model uses any more is gone from the pool as well.
    """

    def __init__(self) -> None:
        self._parameters: WeakValueDictionary[Hashable, nn.Parameter] = WeakValueDictionary()
        self._tokenizers: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._lock = threading.Lock()  # models load on several threads

    def share(self, component: str, module: nn.Module) -> None:
        """Replaces each parameter of `module` by an equal one of the same name that is held already."""
        with self._lock:
            for path, submodule in module.named_modules():
                for name, parameter in submodule.named_parameters(recurse=False):
                    key = (component, path, name, *_fingerprint(parameter))
                    known = self._parameters.get(key)
                    # The fingerprint only finds the candidate: equality is checked on every value.
                    if known is not None and torch.equal(known, parameter):
                        submodule.register_parameter(name, known)
                    else:
                        self._parameters[key] = parameter

    def share_tokenizer(self, tokenizer: Any) -> Any:
        """Returns the tokenizer held already that reads every text as `tokenizer` does, or `tokenizer` itself."""
        definition = tokenizer.backend_tokenizer.to_str() + repr((tokenizer.model_max_length, tokenizer.pad_token))
        key = (type(tokenizer), hashlib.sha256(definition.encode()).digest())
        with self._lock:
            return self._tokenizers.setdefault(key, tokenizer)


def _fingerprint(parameter: nn.Parameter) -> tuple[Hashable, ...]:
    values = parameter.detach().flatten()
    sample = values[:: max(1, values.numel() // FINGERPRINT_VALUES)].to("cpu", torch.float32)
    return tuple(parameter.shape), parameter.dtype, parameter.device.type, sample.numpy().tobytes()


def save_whole(tensors: Mapping[str, torch.Tensor], file: Path, note: str | None = None) -> None:
    """Writes a safetensors file that is whole or not there at all, also when the power fails.

    Args:
        tensors: on the host, each with its own memory.
        file: where; its folder is made if it is not there.
        note: kept in its metadata under NOTE, where there is one entry: safetensors writes several in any order.

    Raises:
        OSError: it cannot be written; what was there before is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file, mode=0o600, prefix=".") as part:
        write_tensors(tensors, part, None if note is None else {NOTE: note})


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, without having it in memory besides. Raises OSError."""
    try:
        save_file(dict(tensors), file, metadata)
    except SafetensorError as error:
        told = SYSTEM_ERROR.search(str(error))
        number = int(told[1]) if told else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def load_noted(file: Path, note: str | None = None) -> dict[str, torch.Tensor] | None:
    """Returns the tensors of a file of `save_whole`; None where it is not there, not whole, or has another note."""
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get(NOTE) != note:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None
