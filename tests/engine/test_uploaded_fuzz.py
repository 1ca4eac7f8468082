"""A thousand models that are broken by chance, a hundred thousand in `make fuzz`: each is refused, or good."""

import json
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from api.engine.adapters import load_adapter
from api.engine.components import Placement, load_pipeline
from api.engine.skeleton import Skeleton
from api.engine.sources import FoundBase
from api.engine.uploaded import examine
from api.engine.weights import TensorPool
from api.errors import ModelUnavailable
from tests import builders
from tests.builders import CONV, LINEAR, TEXT_LAYERS, UNET_LAYERS

SCALE = int(os.environ.get("FUZZ_SCALE", "1"))
MUTATIONS = 1_000 if SCALE == 1 else 5_000 * SCALE
CHUNKS = 10
MOST_BYTES = 1024**3  # that one may take: the process in which a server looks at it has a limit, too
LOADED_EVERY = 20  # of the whole models that are taken: the server loads them, too

CPU = Placement("cpu", torch.float32, torch.float32)
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("-inf")),
    *("", "F8_E4M3", "BOOL", "I64", "F64", "\ud800", "\x00", "../../etc/passwd", "x" * 10_000, "__class__", "auto_map"),
    *([], {}, [[]], [0, 0], [2**62, 2**62], {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}),
]


def changed(content: Any, chance: random.Random) -> Any:
    """A copy of some JSON with one place in it changed."""
    if not isinstance(content, dict | list) or not content or chance.random() < 0.1:
        return chance.choice(ODD)
    places: list[Any] = list(content) if isinstance(content, dict) else list(range(len(content)))
    place, other = chance.choice(places), chance.choice(places)
    copy: Any = content.copy()
    match chance.randrange(8):
        case 0:
            del copy[place]
        case 1:
            copy[place] = content[other]
        case 2 if isinstance(copy, dict):
            names = [f"{place}x", place[:-1], place.upper(), f"\x1b{place}", str(chance.choice(ODD))]
            copy[chance.choice(names)] = copy.pop(place)
        case 2:
            copy.append(chance.choice(ODD))
        case _:
            copy[place] = changed(content[place], chance)
    return copy


def flipped(content: bytes, chance: random.Random, start: int, end: int) -> bytes:
    mutable = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        mutable[chance.randrange(start, max(start + 1, end))] = chance.randrange(256)
    return bytes(mutable)


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    match chance.randrange(4):
        case 0:
            return content[: chance.randrange(len(content))]
        case 1:
            return flipped(content, chance, 0, len(content))
        case _:
            return json.dumps(changed(json.loads(content), chance)).encode()


def mutated_weights(content: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    match chance.randrange(8):
        case 0:
            return content[: chance.choice([chance.randrange(len(content)), chance.randrange(end)])]
        case 1:
            return content + chance.randbytes(chance.randrange(1, 20))
        case 2:
            return flipped(content, chance, 0, 8)
        case 3:
            return flipped(content, chance, 8, end)
        case 4:
            return flipped(content, chance, end, len(content))
        case _:
            header = json.dumps(changed(json.loads(content[8:end]), chance)).encode()
            return len(header).to_bytes(8, "little") + header + content[end:]


@contextmanager
def limited() -> Iterator[None]:
    """Raises MemoryError in the block for whatever wants too much, as two billion layers do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Good models: what is broken in one of them is put right again."""
    home = tmp_path_factory.mktemp("sent")
    pipeline = builders.pipeline()
    unet, text = (
        builders.factors(model, layers)
        for model, layers in ((pipeline.unet, UNET_LAYERS), (pipeline.text_encoder, TEXT_LAYERS))
    )
    config = {"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {LINEAR: 7, CONV: 3}, "unet.use_rslora": True}
    builders.diffusers_lora(home / "diffusers.safetensors", unet, text, config)
    builders.kohya_lora(home / "kohya.safetensors", unet, text, alpha=1.0)
    builders.peft_lora(home / "peft", pipeline.unet, ["to_q", "conv1"], lora_alpha=3)
    (home / "peft/README.md").unlink()
    builders.copy_of(base_folder, home / "folder")
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        tensors = load_file(home / "folder" / file)
        save_file({name: tensor.half() for name, tensor in tensors.items()}, home / "folder" / file)
    builders.single_file(home / "folder", home / "checkpoint.safetensors")
    return home


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Skeleton:
    return Skeleton.of(FoundBase("base", base_folder))


@pytest.mark.filterwarnings("ignore")  # elsewhere they are errors, which would refuse what a server takes
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_whatever_is_sent_is_refused_or_good(home: Path, base_folder: Path, base: Skeleton, chunk: int) -> None:
    chance = random.Random(chunk)
    pipeline = builders.pipeline()
    good: dict[Path, Callable[[], object]] = {
        file: partial(load_adapter, file, pipeline, 1.0)
        for file in (home / "diffusers.safetensors", home / "kohya.safetensors")
    }
    good[home / "peft"] = partial(load_adapter, home / "peft/adapter_model.safetensors", pipeline, 1.0)
    for path, config in ((home / "folder", None), (home / "checkpoint.safetensors", base_folder)):
        good[path] = partial(load_pipeline, FoundBase(path.name, path, config), CPU, TensorPool())
    wholes, seen, reasons = 0, Counter[tuple[str, str]](), list[str]()
    for _ in range(MUTATIONS // CHUNKS):
        path = chance.choice(list(good))
        files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
        file = chance.choice([one for one in files if one.is_file() and one.name != "tokenizer.json"])
        content = file.read_bytes()
        mutate = mutated_weights if file.suffix == ".safetensors" else mutated_json
        file.write_bytes(mutate(content, chance))
        try:
            with limited():
                checked = examine(path, base)
        except (ModelUnavailable, MemoryError) as error:
            seen["refused", path.name] += 1
            reasons.append(str(error))
        else:
            seen[checked.kind, path.name] += 1
            wholes += checked.kind == "full"
            if checked.kind == "lora" or wholes % LOADED_EVERY == 1:
                good[path]()
        finally:
            file.write_bytes(content)
    print(seen, Counter(reason[:60] for reason in reasons).most_common(12))
    assert not [reason for reason in reasons if str(home) in reason]
    assert len({kind for kind, _ in seen}) == 3, seen
