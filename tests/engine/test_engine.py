import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from api.engine.adapters import Adapter
from api.engine.base import Base
from api.engine.engine import GPU_SHARE, HOST_SHARE, Engine
from api.engine.pipeline import Drawing
from api.engine.shelf import LeasedModel
from api.engine.sources import FoundBase
from api.engine.weights import storages_of, tensors_of
from api.errors import OutOfMemory
from tests import builders

Open = Callable[..., Engine]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    opened = []

    def open_one(**fields: Any) -> Engine:
        opened.append(Engine(builders.settings(**fields)))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(open_engine: Open) -> Engine:
    return open_engine()


def test_it_says_where_it_draws(engine: Engine) -> None:
    assert (engine.device, engine.dtype) == ("cpu", "float32")
    assert engine.threads == torch.get_num_threads()


def test_warnings_of_diffusers_stay_out_of_the_log(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "level", logging.INFO)
    open_engine()
    assert not logging.getLogger("diffusers.pipelines").isEnabledFor(logging.WARNING)


def test_budgets_are_as_set_or_a_share_of_what_is_free(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine(host_cache_gb=0.5).budgets() == {"cpu": 500_000_000}
    engine = open_engine(host_cache_gb=0)
    monkeypatch.setattr(engine, "free_bytes", lambda device: {"cpu": 1000, "cuda": 100}[device])
    assert engine.budgets() == {"cpu": 1000 * HOST_SHARE}
    monkeypatch.setattr(Engine, "device", "cuda")
    assert engine.budgets() == {"cpu": 1000 * HOST_SHARE, "cuda": 100 * GPU_SHARE}


def test_the_bytes_expected_are_the_bytes_held(engine: Engine, base_folder: Path) -> None:
    found = engine.find_base(builders.source(base_folder))
    held = sum(size for _, size in engine.load_base(found).sizes.values())
    assert 0 <= held - engine.base_bytes(found)["cpu"] < 1000  # buffers that no file holds


def test_a_base_for_a_gpu_passes_the_host_in_float32(
    open_engine: Open, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(dtype="float16")
    found = engine.find_base(builders.source(base_folder))
    monkeypatch.setattr(Engine, "device", "cuda")
    expected = engine.base_bytes(found)
    assert expected["cpu"] == 2 * expected["cuda"] > 0


def test_a_containers_limit_bounds_what_is_free(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.host.CGROUP", tmp_path)
    unbounded = engine.free_bytes("cpu")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert engine.free_bytes("cpu") == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert engine.free_bytes("cpu") > unbounded / 2


def test_a_base_leaves_no_copy_of_its_weights_uncounted(engine: Engine, base_folder: Path) -> None:
    loaded = engine.load_base(FoundBase("base", base_folder))
    assert isinstance(loaded.value, Base)
    modules = (loaded.value.unet.module, loaded.value.texts._slots.module)
    copies = storages_of(tensor for module in modules for tensor in tensors_of(module))
    assert copies.keys() <= loaded.sizes.keys()


def lora(base: Base, folder: Path, seed: int = 5) -> Path:
    unet = builders.factors(base.pipeline.unet, builders.UNET_LAYERS, seed=seed)
    text = builders.factors(base.pipeline.text_encoder, builders.TEXT_LAYERS, seed=seed)
    return builders.diffusers_lora(folder / f"{seed}.safetensors", unet, text)


def loaded_base(engine: Engine, folder: Path) -> Base:
    base = engine.load_base(FoundBase("base", folder)).value
    assert isinstance(base, Base)
    return base


def draw_with(engine: Engine, base: Base, adapter: Adapter | None) -> Drawing:
    return engine.draw(LeasedModel(base, "", adapter, True), builders.request(), 7, lambda step: None)


def test_an_adapter_that_is_dropped_leaves_its_base(engine: Engine, base_folder: Path, tmp_path: Path) -> None:
    base = loaded_base(engine, base_folder)
    ada, bo = (engine.load_adapter(lora(base, tmp_path, seed), base, 1.0) for seed in range(2))
    assert isinstance(ada.value, Adapter)
    assert isinstance(bo.value, Adapter)
    for each in (ada.value, bo.value):
        assert draw_with(engine, base, each).lane == "batch"
    assert base.unet.warm() == [ada.value.key, bo.value.key]
    ada.on_drop()
    assert base.unet.warm() == base.texts._slots.warm() == [bo.value.key]
    assert {key for key, _ in base.texts._known} == {bo.value.key}


def test_an_adapter_keeps_no_base_that_left_before_it(engine: Engine, base_folder: Path, tmp_path: Path) -> None:
    base = loaded_base(engine, base_folder)
    adapter = engine.load_adapter(lora(base, tmp_path), base, 1.0)
    left = weakref.ref(base)
    del base
    engine.free_memory()
    assert left() is None
    adapter.on_drop()


def load_base(engine: Engine, base: Path) -> None:
    engine.load_base(FoundBase("base", base))


def load_adapter(engine: Engine, base: Path) -> None:
    tiny = Base(builders.pipeline(), 1)
    engine.load_adapter(lora(tiny, base.parent), tiny, 1.0)


def draw(engine: Engine, base: Path) -> None:
    draw_with(engine, Base(builders.pipeline(), 1), None)


ON_HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried…")
ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("action", "where"),
    [
        (load_base, "api.engine.components._load_folder"),
        (load_adapter, "api.engine.adapters.safe_open"),
        (draw, "api.engine.engine.draw"),
        (draw, "api.engine.batch.step"),
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
