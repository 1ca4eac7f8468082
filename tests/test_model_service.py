import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from api.config import ModelSource
from api.engine.base import Base
from api.engine.deltas import LEAST_PSNR, Delta, extract, fingerprint, write_delta
from api.engine.pipeline import Step
from api.engine.shelf import LeasedModel
from api.engine.sources import FoundBase, count_values
from api.errors import ModelUnavailable, OutOfMemory, ShuttingDown, UnsupportedSize
from api.model_service import ModelService
from tests import builders
from tests.waiting import until

WAIT = 60  # seconds until a lost thread fails the test
DELTA_OFF = 6  # levels of 255: the factors of a delta are kept in float16
ROUNDING = 2  # levels of 255: how many rows a batch has changes the last digits of latents
Open = Callable[..., ModelService]


@pytest.fixture(scope="module")
def sources(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """A base for all, two adapters over it, and another base."""
    folder = tmp_path_factory.mktemp("sitters")
    pipeline = builders.pipeline()
    for seed, name in enumerate(("ada", "bo")):
        factors = builders.factors(pipeline.unet, builders.UNET_LAYERS, seed=seed)
        text = builders.factors(pipeline.text_encoder, builders.TEXT_LAYERS, seed=seed)
        builders.diffusers_lora(folder / f"{name}.safetensors", factors, text)
    return {
        "default": builders.source(base_folder),
        "ada": builders.source(base_folder, lora=str(folder / "ada.safetensors")),
        "bo": builders.source(base_folder, lora=str(folder / "bo.safetensors")),
        "chi": builders.source(builders.save_pipeline(folder / "chi", seed=1)),
    }


@pytest.fixture
def open_service(sources: dict[str, ModelSource]) -> Iterator[Open]:
    opened = []

    def open_one(more: dict[str, ModelSource] | None = None, **fields: Any) -> ModelService:
        opened.append(ModelService(builders.settings({**sources, **(more or {})}, **fields)))
        return opened[-1]

    yield open_one
    for service in opened:
        service.close()


@pytest.fixture
def service(open_service: Open) -> ModelService:
    return open_service()


def draw(service: ModelService, user: str, **fields: Any) -> bytes:
    return service.generate(builders.request(user_id=user, **fields)).pngs[0]


def difference(one: bytes, other: bytes) -> int:
    """The largest difference between two PNGs' values, 0 to 255."""
    pictures = [np.asarray(Image.open(io.BytesIO(png)), int) for png in (one, other)]
    return int(np.abs(pictures[0] - pictures[1]).max())


def tasks(service: ModelService) -> int:
    """How many drawings the step loop has in hand, and is to make next."""
    return len(service.engine._batch._tasks) + len(service.engine._batch._work)


def cached(service: ModelService) -> set[str]:
    return {str(info.key) for info in service.cache.info()}


def users(service: ModelService) -> int:
    return sum(info.users for info in service.cache.info())


def test_a_generation_says_how_it_was_made(service: ModelService, sources: dict[str, ModelSource]) -> None:
    generation = service.generate(builders.request(user_id="ada", num_images=3, seed=40, width=320))
    assert generation.seeds == [40, 41, 42]
    assert generation.model_id == sources["ada"].lora
    pictures = [Image.open(io.BytesIO(png)) for png in generation.pngs]
    assert [(picture.format, picture.size) for picture in pictures] == [("PNG", (320, 256))] * 3
    assert generation.timings.denoise > 0
    assert generation.timings.decode > 0
    assert generation.timings.load > 0
    assert generation.lane == "batch"
    assert generation.timings.denoise + generation.timings.decode >= generation.device_seconds
    assert generation.device_seconds > generation.timings.decode


def test_a_seed_is_chosen_and_told(service: ModelService) -> None:
    first, second = (service.generate(builders.request(seed=None)) for _ in range(2))
    assert first.seeds != second.seeds
    assert draw(service, "default", seed=first.seeds[0]) == first.pngs[0]


def test_a_user_without_a_model_gets_the_default(service: ModelService, sources: dict[str, ModelSource]) -> None:
    generation = service.generate(builders.request(user_id="nobody"))
    assert generation.model_id == sources["default"].base
    assert generation.pngs[0] == draw(service, "default")
    assert generation.lane == "exact"


def test_every_user_gets_another_picture(service: ModelService) -> None:
    assert len({draw(service, user) for user in ("default", "ada", "bo", "chi")}) == 4


def test_the_cache_is_told_hit_or_miss(service: ModelService) -> None:
    asked = [("ada", False), ("ada", True), ("bo", False), ("default", True), ("chi", False), ("bo", True)]
    assert [(user, service.generate(builders.request(user_id=user)).cache_hit) for user, _ in asked] == asked


def test_bases_share_what_is_equal(service: ModelService) -> None:
    draw(service, "default")
    alone = service.cache.used()
    draw(service, "chi")
    one, other = service.cache.info()
    assert one.total_bytes == other.total_bytes == alone
    assert service.cache.used() == alone + one.own_bytes
    assert one.own_bytes < alone
    service.cache.check()


def test_many_requests_at_once_load_each_model_once(service: ModelService, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load_base = service.engine.load_base
    load_adapter = service.engine.load_adapter

    def counted_base(found: FoundBase) -> Any:
        loads.append(found.path.name)
        return load_base(found)

    def counted_adapter(path: Path, *rest: Any) -> Any:
        loads.append(path.name)
        return load_adapter(path, *rest)

    monkeypatch.setattr(service.engine, "load_base", counted_base)
    monkeypatch.setattr(service.engine, "load_adapter", counted_adapter)
    start = threading.Barrier(12)

    def work(index: int) -> bytes:
        start.wait(WAIT)
        return draw(service, ("ada", "bo", "chi")[index % 3])

    with ThreadPoolExecutor(12) as pool:
        drawn = list(pool.map(work, range(12)))
    for index, png in enumerate(drawn):
        assert [difference(png, other) <= ROUNDING for other in drawn[:3]] == [index % 3 == each for each in range(3)]
    assert sorted(loads) == ["ada.safetensors", "base", "bo.safetensors", "chi"]


@pytest.mark.parametrize(("reproducible", "rounding"), [(False, ROUNDING), (True, 0)])
def test_users_of_one_base_never_mix(
    service: ModelService, open_service: Open, reproducible: bool, rounding: int
) -> None:
    jobs = [
        (user, {"seed": seed, "scheduler": scheduler, "num_inference_steps": steps})
        for seed, (scheduler, steps) in enumerate([(None, 2), ("euler_a", 3), ("unipc", 4), ("dpmpp_2m", 2)])
        for user in ("default", "ada", "bo")
    ] * 2
    start = threading.Barrier(8)

    def work(thread: int) -> list[bytes]:
        start.wait(WAIT)
        return [draw(service, user, **fields, reproducible=reproducible) for user, fields in jobs[thread::8]]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    alone = open_service()
    for thread, pictures in enumerate(together):
        twins = [draw(alone, user, **fields, reproducible=reproducible) for user, fields in jobs[thread::8]]
        assert max(map(difference, pictures, twins)) <= rounding


def slotted(model: LeasedModel) -> Base:
    assert isinstance(model.base, Base)
    return model.base


def test_requests_of_several_threads_share_steps(service: ModelService) -> None:
    expected = {user: draw(service, user, num_inference_steps=4) for user in ("default", "ada", "bo")}
    rows: list[int] = []

    def together(step: Step) -> None:
        if step.done == 1:
            until(lambda: tasks(service) == 3)

    with service.lease(service._settings.user_models["default"]) as model:
        unet = slotted(model).unet.module
    handle = unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(service.generate, builders.request(user_id="ada", num_inference_steps=4), together)
        others = [pool.submit(draw, service, user, num_inference_steps=4) for user in ("default", "bo")]
        drawn = dict(
            zip(
                ("default", "bo", "ada"), [*(other.result(WAIT) for other in others), *first.result().pngs], strict=True
            )
        )
    handle.remove()
    assert max(rows) == 6
    assert sum(rows) == 3 * 2 * 4
    assert {user: difference(drawn[user], expected[user]) <= ROUNDING for user in expected} == dict.fromkeys(
        expected, True
    )


def test_switching_models_under_a_small_budget_draws_the_same(open_service: Open, service: ModelService) -> None:
    draw(service, "default")
    one = service.cache.used()
    expected = {user: draw(service, user) for user in ("default", "chi", "ada")}
    small = open_service(host_cache_gb=1.05 * one / 1e9)
    for user in ("default", "chi", "ada", "chi", "default", "ada"):
        assert draw(small, user) == expected[user]
        small.cache.check()
    assert small.cache.used() <= 1.05 * one


class Failing:
    """Stands in for a method of the engine: fails a number of times, then does as it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, service: ModelService, method: str, times: int) -> None:
        self.real = getattr(service.engine, method)
        self.left = times
        self.calls = 0
        monkeypatch.setattr(service.engine, method, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise OutOfMemory("no room")
        return self.real(*args)


@pytest.mark.parametrize("method", ["draw", "load_base"])
def test_out_of_memory_evicts_the_idle_and_tries_again(
    service: ModelService, monkeypatch: pytest.MonkeyPatch, sources: dict[str, ModelSource], method: str
) -> None:
    expected = draw(service, "default")
    service.clear_cache()
    draw(service, "chi")
    failing = Failing(monkeypatch, service, method, times=1)
    assert draw(service, "default") == expected
    assert failing.calls == 2
    assert cached(service) == {sources["default"].base}


@pytest.mark.parametrize("method", ["draw", "load_base"])
def test_out_of_memory_twice_is_an_error_of_that_request_alone(
    service: ModelService, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    failing = Failing(monkeypatch, service, method, times=2)
    with pytest.raises(OutOfMemory, match="no room"):
        draw(service, "ada")
    assert failing.calls == 2
    assert users(service) == 0
    assert draw(service, "ada")  # out of memory is not remembered as a broken model
    service.cache.check()


def test_a_model_over_the_budget_is_unavailable(open_service: Open) -> None:
    with pytest.raises(ModelUnavailable, match="the cache may take"):
        draw(open_service(host_cache_gb=1e-6), "default")


def test_a_broken_model_is_remembered_until_the_cache_is_cleared(
    open_service: Open, base_folder: Path, tmp_path: Path
) -> None:
    folder = builders.copy_of(base_folder, tmp_path / "eve")
    index = (folder / "model_index.json").read_bytes()
    (folder / "model_index.json").unlink()
    service = open_service({"eve": builders.source(folder)})
    reasons = []
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="eve has no model_index") as caught:
            draw(service, "eve")
        reasons.append((caught.value.detail, caught.value.hint))
        # The disk is whole from now on: only an answer from memory still refuses.
        (folder / "model_index.json").write_bytes(index)
    assert len(set(reasons)) == 1
    assert draw(service, "default")
    service.clear_cache()
    assert draw(service, "eve") == draw(service, "default")


def test_a_broken_model_is_tried_again_after_a_while(
    open_service: Open, tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.finder.FAILURE_MEMORY_SECONDS", 0.0)
    service = open_service({"eve": builders.source(tmp_path / "eve")})
    with pytest.raises(ModelUnavailable, match="is not there"):
        draw(service, "eve")
    builders.copy_of(base_folder, tmp_path / "eve")
    assert draw(service, "eve")


def test_a_broken_adapter_leaves_its_base_free(open_service: Open, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"")
    service = open_service({"eve": builders.source(base_folder, lora=str(tmp_path / "lora.safetensors"))})
    with pytest.raises(ModelUnavailable, match=r"lora\.safetensors"):
        draw(service, "eve")
    assert cached(service) == {str(base_folder)}
    assert users(service) == 0


class StoppedError(Exception):
    pass


def test_a_drawing_that_fails_leaves_its_models_free(service: ModelService) -> None:
    def stop(step: Step) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        service.generate(builders.request(user_id="ada"), stop)
    assert users(service) == 0
    assert draw(service, "default") != draw(service, "ada")


def test_on_step_counts(service: ModelService) -> None:
    seen: list[tuple[int, int]] = []
    service.generate(builders.request(num_inference_steps=3), lambda step: seen.append((step.done, step.of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_clearing_frees_the_idle_now_and_the_used_later(service: ModelService, sources: dict[str, ModelSource]) -> None:
    draw(service, "chi")
    with service.lease(sources["ada"]) as model:
        assert model.adapter is not None
        before = service.cache.used()
        freed, deferred = service.clear_cache()
        assert freed > 0
        assert deferred > 0
        assert freed + deferred == before
        assert service.cache.used() == deferred
    assert service.cache.used() == 0
    service.cache.check()


class Held:
    """A drawing that stops after its first step until the test lets it go on."""

    def __init__(self) -> None:
        self.drawing = threading.Event()
        self.go_on = threading.Event()
        self.steps = 0

    def __call__(self, step: Step) -> None:
        self.steps = step.done
        self.drawing.set()
        assert self.go_on.wait(WAIT)


def test_a_model_cleared_while_it_draws_finishes_its_picture(service: ModelService) -> None:
    expected = draw(service, "ada", num_inference_steps=3)
    held = Held()
    with ThreadPoolExecutor(1) as pool:
        request = builders.request(user_id="ada", num_inference_steps=3)
        drawing = pool.submit(service.generate, request, held)
        assert held.drawing.wait(WAIT)
        freed, deferred = service.clear_cache()
        assert (freed, cached(service)) == (0, set())
        held.go_on.set()
        [png] = drawing.result(WAIT).pngs
    assert difference(png, expected) <= ROUNDING
    assert deferred > 0
    assert service.cache.used() == 0


def test_many_waiting_users_stay_within_the_budget(
    open_service: Open, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"user{number}" for number in range(6)]
    more = {
        user: builders.source(builders.save_pipeline(tmp_path / user, seed=seed)) for seed, user in enumerate(users, 10)
    }
    alone = 4 * count_values(base_folder)
    service = open_service(more, host_cache_gb=2.5 * alone / 1e9)
    held: list[int] = []
    draw_it = service.engine.draw

    def watched(*arguments: Any) -> Any:
        held.append(service.cache.used())
        return draw_it(*arguments)

    monkeypatch.setattr(service.engine, "draw", watched)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda user: draw(service, user), users * 2))
    assert len(held) == 12
    assert max(held) <= 2.5 * alone


def test_a_wrong_size_is_told_before_the_model_loads(service: ModelService) -> None:
    with pytest.raises(UnsupportedSize):
        draw(service, "ada", width=260)
    assert cached(service) == set()


def test_closing_ends_the_drawing_and_refuses_what_waits(open_service: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.model_service.BASES_IN_USE", 1)
    monkeypatch.setattr("api.engine.turns.PASSING_SECONDS", 0.0)
    service = open_service()
    draw(service, "ada")
    held = Held()
    with ThreadPoolExecutor(5) as pool:
        drawing = pool.submit(service.generate, builders.request(user_id="ada", num_inference_steps=150), held)
        assert held.drawing.wait(WAIT)
        waiting: list[Future[Any]] = [pool.submit(draw, service, "bo")]  # for the step loop, which is held
        until(lambda: tasks(service) == 2)
        waiting.append(pool.submit(draw, service, "chi"))  # for the other base
        until(lambda: len(service._turns._waiting) == 1)
        waiting.append(pool.submit(draw, service, "ada"))  # behind that one
        until(lambda: len(service._turns._waiting) == 2)
        closing = pool.submit(service.close)
        assert service._stopping.wait(WAIT)
        held.go_on.set()
        errors = [future.exception(WAIT) for future in (drawing, *waiting)]
        closing.result(WAIT)
    assert [type(error) for error in errors] == [ShuttingDown] * 4
    assert held.steps == 1
    assert users(service) == 0
    with pytest.raises(ShuttingDown):
        draw(service, "ada")


def test_a_service_may_be_closed_at_once_and_twice(open_service: Open) -> None:
    service = open_service()
    service.close()
    service.close()


def test_a_user_who_is_forgotten_takes_along_what_nobody_else_draws_with(service: ModelService) -> None:
    service.forget("ada")  # before anything is loaded
    for user in ("default", "ada", "bo", "chi"):
        draw(service, user)
    everything = cached(service)
    service.forget("ada")
    assert everything - cached(service) == {key for key in everything if "ada" in key}
    service.forget("chi")
    assert len(cached(service)) == 2
    service.forget("nobody")
    assert {key for key in cached(service) if "bo" in key}
    assert len(cached(service)) == 2


def forget_all(service: ModelService) -> None:
    for user in ("ada", "bo"):
        service.forget(user)


Forget = Callable[[ModelService], Any]
FORGETS: dict[str, Forget] = {
    "forget": forget_all,
    "clear_cache": ModelService.clear_cache,
}


@pytest.mark.parametrize("forget", FORGETS.values(), ids=FORGETS)
def test_what_is_forgotten_leaves_no_copy_in_its_base(
    service: ModelService, sources: dict[str, ModelSource], forget: Forget
) -> None:
    with service.lease(sources["default"]) as model:
        for user in ("ada", "bo", "default"):
            draw(service, user)
        base = slotted(model)
        keys = base.unet.warm()
        assert (len(keys), base.texts._slots.warm()) == (2, keys[1:])
        assert {key for key, _ in base.texts._known} == {*keys, None}
        forget(service)
        assert base.unet.warm() == base.texts._slots.warm() == []
        assert {key for key, _ in base.texts._known} == {None}
        for slots in (base.unet, base.texts._slots):
            assert not any(factor.any() for table in slots._tables.values() for factor in table.tensors())


def test_who_is_forgotten_while_they_draw_leaves_no_copy_afterwards(
    service: ModelService, sources: dict[str, ModelSource]
) -> None:
    expected = draw(service, "ada", num_inference_steps=3)
    held = Held()
    with service.lease(sources["default"]) as model, ThreadPoolExecutor(1) as pool:
        request = builders.request(user_id="ada", num_inference_steps=3)
        drawing = pool.submit(service.generate, request, held)
        assert held.drawing.wait(WAIT)
        service.forget("ada")
        assert len(slotted(model).unet.warm()) == 1
        held.go_on.set()
        assert drawing.result(WAIT).pngs == [expected]
        assert slotted(model).unet.warm() == slotted(model).texts._slots.warm() == []


def test_who_is_forgotten_leaves_no_copy_in_a_base_that_was_loaded_again(
    service: ModelService, sources: dict[str, ModelSource]
) -> None:
    draw(service, "ada")
    service.cache.drop(sources["default"])  # as a full cache does, which takes the base before the adapter over it
    draw(service, "ada")
    with service.lease(sources["default"]) as model:
        assert len(slotted(model).unet.warm()) == 1
        service.forget("ada")
        assert slotted(model).unet.warm() == slotted(model).texts._slots.warm() == []


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a delta of rank 2 over the base is nearly equal to."""
    folder = tmp_path_factory.mktemp("tuned") / "eva"
    builders.finetuned(builders.pipeline(), 2).save_pretrained(folder)
    return folder


def delta_of(checkpoint: Path, base: Path, file: Path, psnr: float = 50) -> ModelSource:
    """Eva's model: the checkpoint with a delta in `file`, of which the gate is said to have measured `psnr`."""
    tuned, plain = (StableDiffusionPipeline.from_pretrained(folder) for folder in (checkpoint, base))
    base_mark, mark = (fingerprint(FoundBase("", folder)) for folder in (base, checkpoint))
    write_delta(file, extract(plain, tuned, 2).tensors, Delta(str(base), base_mark, mark, 2, (psnr,)))
    return builders.source(checkpoint, delta=str(file))


def test_a_delta_is_drawn_in_place_of_its_checkpoint(
    open_service: Open, base_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    eva = delta_of(tuned, base_folder, tmp_path / "delta.safetensors")
    service = open_service({"eva": eva, "whole": eva.itself()})
    request = builders.request(user_id="eva")
    by_delta = service.generate(request)
    assert (by_delta.lane, by_delta.model_id) == ("delta", str(tuned))
    assert cached(service) == {str(base_folder), str(tmp_path / "delta.safetensors")}
    with ThreadPoolExecutor() as pool:
        drawn = list(pool.map(partial(draw, service), ["eva", "ada", "eva", "bo"]))
    whole = draw(service, "whole")
    for png in (by_delta.pngs[0], drawn[0], drawn[2]):
        assert difference(png, whole) <= DELTA_OFF
    for user, png in (("ada", drawn[1]), ("bo", drawn[3]), ("default", draw(service, "default"))):
        assert difference(png, whole) > 5 * DELTA_OFF, user
    exact = service.generate(request.model_copy(update={"reproducible": True}))
    assert (exact.lane, exact.model_id) == ("exact", str(tuned))
    assert exact.pngs == service.generate(builders.request(user_id="whole", reproducible=True)).pngs


def test_a_delta_that_is_too_far_off_or_of_another_training_is_not_drawn(
    open_service: Open, base_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    far = delta_of(tuned, base_folder, tmp_path / "far.safetensors", psnr=LEAST_PSNR - 1)
    again = builders.copy_of(tuned, tmp_path / "again")
    old = delta_of(again, base_folder, tmp_path / "old.safetensors")
    builders.finetuned(builders.pipeline(), 2, seed=9).save_pretrained(again)
    service = open_service({"far": far, "old": old})
    assert [service.generate(builders.request(user_id=user)).lane for user in ("far", "old")] == ["exact"] * 2
    assert difference(draw(service, "old"), draw(service, "far")) > 5 * DELTA_OFF


def test_whoever_has_a_delta_is_forgotten_whole(
    open_service: Open, base_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    eva = delta_of(tuned, base_folder, tmp_path / "delta.safetensors")
    service = open_service({"eva": eva})
    draw(service, "eva")
    draw(service, "eva", reproducible=True)
    service.forget("eva")
    assert cached(service) == {str(base_folder)}


def test_a_delta_that_is_not_there_is_the_checkpoint(open_service: Open, tuned: Path) -> None:
    service = open_service({"eva": builders.source(tuned, delta="/nowhere/delta.safetensors")})
    assert service.generate(builders.request(user_id="eva")).lane == "exact"


def test_a_new_delta_is_drawn_without_a_new_start(
    open_service: Open, base_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    file = tmp_path / "delta.safetensors"
    service = open_service({"eva": builders.source(tuned, delta=str(file))})
    lanes = [service.generate(builders.request(user_id="eva")).lane]
    delta_of(tuned, base_folder, file)
    lanes.append(service.generate(builders.request(user_id="eva")).lane)
    assert str(tuned) in service.warm()
    os.utime(file, (1, 1))
    delta_of(tuned, base_folder, file, psnr=LEAST_PSNR - 1)
    lanes.append(service.generate(builders.request(user_id="eva")).lane)
    assert lanes == ["exact", "delta", "exact"]


def test_a_delta_over_a_base_that_was_trained_again_is_not_drawn(
    open_service: Open, base_folder: Path, tuned: Path, tmp_path: Path
) -> None:
    base = builders.copy_of(base_folder, tmp_path / "base")
    eva = delta_of(tuned, base, tmp_path / "delta.safetensors")
    builders.save_pipeline(base, seed=4)
    service = open_service({"eva": eva})
    assert service.generate(builders.request(user_id="eva")).lane == "exact"


def test_books_that_are_off_are_found_once_nobody_draws_and_made_anew(
    service: ModelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.model_service.CHECK_SECONDS", 0.0)
    monkeypatch.setattr(service, "_next_check", 0.0)
    picture = draw(service, "ada")
    loads = service.cache.count()
    service.cache._used["cpu"] += 1
    assert difference(draw(service, "ada"), picture) <= ROUNDING  # the picture is not lost by it
    assert service.cache.count() == 0
    service.cache.check()
    assert difference(draw(service, "ada"), picture) <= ROUNDING
    assert service.cache.count() == loads


def test_models_that_others_have_too_are_nobodys_own(base_folder: Path) -> None:
    shared, own = builders.source(base_folder, lora="shared"), builders.source("own", lora="adas")
    settings = builders.settings({"default": builders.source(base_folder), "ada": own, "bo": shared, "eve": shared})
    owners = settings.owners()
    assert (owners["adas"], owners["own"]) == ("ada", "ada")
    assert not {"shared", str(base_folder)} & owners.keys()
