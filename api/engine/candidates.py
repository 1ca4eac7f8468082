"""Candidates of a training on the disk: the file of a LoRA, or the folder of a whole model, as others load them."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from api.engine.adapters import Adapter, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.sources import INDEX, FoundBase, weight_files
from api.engine.stock import StockBase
from api.engine.stock_adapters import StockAdapter, load_stock_adapter
from api.engine.text2image import read_index
from api.engine.threads import in_own_thread
from api.engine.weights import write_tensors
from api.errors import InvalidRequest
from api.whole import sync_file, sync_folder

SETTINGS = ("*.json", "*.txt", "*.jinja")
SHARDS = ".index.json"  # lists the files that weights lie in; what learned lies in one
OF_TRANSFORMERS, OF_DIFFUSERS = "model.safetensors", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Ground:
    """What a training is over.

    Attributes:
        base: leased meanwhile; it stays as it is.
        found: where it is on this disk.
        mark: tells it from every other.
        batch: the step loop.
        load: loads another one.
    """

    base: Base | StockBase
    found: FoundBase
    mark: str
    batch: Batch
    load: Callable[[FoundBase], Base | StockBase]


def require_folder(found: FoundBase) -> None:
    """Raises InvalidRequest unless a whole model can be made of the base's files."""
    if found.config is not None:
        raise InvalidRequest(
            "over this base LoRAs alone are trained: it is a single file",
            "The operator may put its folder in USER_MODELS, as `save_pretrained` writes it.",
        )


def save_model(found: FoundBase, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the folder of a whole model, which is whole or not there at all.

    Args:
        found: the base; what did not learn is copied from there.
        tensors: the weights of what did, on the host, by component and name.
        folder: where; one that is there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of somebody who died over it
    part.mkdir(parents=True)
    shutil.copyfile(found.path / INDEX, part / INDEX)
    index, learned = read_index(found.path), _by_component(tensors)
    for name, kind in index.components.items():
        if kind is None:
            continue
        there = found.path / name
        settings = [file for pattern in SETTINGS for file in there.glob(pattern)]
        if name not in learned:
            _copy([*settings, *weight_files(there)], part / name)
            continue
        _copy([file for file in settings if not file.name.endswith(SHARDS)], part / name)
        weights = OF_TRANSFORMERS if issubclass(kind, PreTrainedModel) else OF_DIFFUSERS
        write_tensors(learned[name], part / name / weights, {"format": "pt"})
    for file in part.rglob("*"):
        if file.is_file():
            sync_file(file)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    sync_folder(folder.parent)


def discard(candidate: Path) -> None:
    """Removes a candidate that is not wanted any more."""
    if candidate.is_dir():
        shutil.rmtree(candidate)
    else:
        candidate.unlink(missing_ok=True)


@contextmanager
def opened(ground: Ground, candidate: Path) -> Iterator[tuple[Base | StockBase, Adapter | StockAdapter | None]]:
    """Gives the base and the LoRA that draw for a candidate inside the block; none over a whole model of its own.

    They are loaded by the very loaders that load it for drawings later.
    """
    base, batch = ground.base, ground.batch
    if candidate.is_dir():
        yield in_own_thread(partial(ground.load, replace(ground.found, path=candidate))), None
    elif isinstance(base, StockBase):
        yield base, in_own_thread(partial(load_stock_adapter, candidate, base.pipeline, 1.0))
    else:
        adapter = batch.run_behind(partial(load_adapter, candidate, base.pipeline, 1.0))
        try:
            yield base, adapter
        finally:
            base.drop(adapter)


def _by_component(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts = defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        component, _, own = name.partition(".")
        parts[component][own] = tensor
    return parts


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
