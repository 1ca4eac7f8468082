import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from api.engine.engine import GPU_SHARE, HOST_SHARE, Engine
from api.engine.sources import FoundBase
from api.errors import OutOfMemory
from tests import builders


@pytest.fixture
def engine() -> Engine:
    return Engine(builders.settings())


def test_it_says_where_it_draws(engine: Engine) -> None:
    assert (engine.device, engine.dtype) == ("cpu", "float32")
    assert engine.threads == torch.get_num_threads()


def test_warnings_of_diffusers_stay_out_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.INFO)
    Engine(builders.settings())
    assert not logging.getLogger("diffusers.pipelines").isEnabledFor(logging.WARNING)


def test_budgets_are_as_set_or_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine(builders.settings(host_cache_gb=0.5)).budgets() == {"cpu": 500_000_000}
    engine = Engine(builders.settings(host_cache_gb=0))
    monkeypatch.setattr(engine, "free_bytes", lambda device: {"cpu": 1000, "cuda": 100}[device])
    assert engine.budgets() == {"cpu": 1000 * HOST_SHARE}
    monkeypatch.setattr(Engine, "device", "cuda")
    assert engine.budgets() == {"cpu": 1000 * HOST_SHARE, "cuda": 100 * GPU_SHARE}


def test_the_bytes_expected_are_the_bytes_held(engine: Engine, base_folder: Path) -> None:
    found = engine.find_base(builders.source(base_folder))
    held = sum(size for _, size in engine.load_base(found).sizes.values())
    assert 0 <= held - engine.base_bytes(found)["cpu"] < 1000  # buffers that no file holds


def test_a_base_for_a_gpu_passes_the_host_in_float32(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(builders.settings(dtype="float16"))
    found = engine.find_base(builders.source(base_folder))
    monkeypatch.setattr(Engine, "device", "cuda")
    expected = engine.base_bytes(found)
    assert expected["cpu"] == 2 * expected["cuda"] > 0


def test_a_containers_limit_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.engine.CGROUP", tmp_path)
    unbounded = Engine(builders.settings()).free_bytes("cpu")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert Engine(builders.settings()).free_bytes("cpu") == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert Engine(builders.settings()).free_bytes("cpu") > unbounded / 2


def load_base(engine: Engine, base: Path) -> None:
    engine.load_base(FoundBase("base", base))


def load_adapter(engine: Engine, base: Path) -> None:
    pipeline = builders.pipeline()
    factors = builders.factors(pipeline.unet, builders.UNET_LAYERS)
    engine.load_adapter(builders.diffusers_lora(base.parent / "lora.safetensors", factors, {}), pipeline, 1.0)


def draw(engine: Engine, base: Path) -> None:
    engine.draw(builders.pipeline(), None, builders.request(), 7, lambda step: None)


ON_HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried…")
ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("action", "where"),
    [
        (load_base, "api.engine.components._load_folder"),
        (load_adapter, "api.engine.adapters.safe_open"),
        (draw, "api.engine.engine.draw"),
    ],
)
@pytest.mark.parametrize(("error", "who"), [(ON_HOST, "computer"), (ON_GPU, "GPU")])
def test_torch_without_room_is_out_of_memory(
    engine: Engine,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[Engine, Path], None],
    where: str,
    error: Exception,
    who: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(where, full)
    with pytest.raises(OutOfMemory, match=f"the {who} has no memory left"):
        action(engine, base_folder)


def test_other_errors_of_torch_stay_what_they_are(
    engine: Engine, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr("api.engine.engine.draw", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        draw(engine, base_folder)
