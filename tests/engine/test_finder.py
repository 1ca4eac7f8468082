import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.engine import finder, sources
from api.engine.finder import Finder
from api.engine.sources import FoundBase
from api.errors import ModelUnavailable
from tests import builders
from tests.hub import Hub

WAIT = 30  # seconds until a lost thread fails the test
SETTINGS = builders.settings(hub_timeout_seconds=WAIT)
EVE = builders.source("somebody/model")


def new_finder() -> Finder:
    return Finder(lambda base: sources.find_base(base, SETTINGS))


def reason(find: Callable[[], FoundBase]) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        find()
    return caught.value.detail


def asked_by_twelve(hub: Hub) -> tuple[int, set[Path | str]]:
    """Twelve first requests at once: how often the hub was asked, and the answers."""
    bases, start = new_finder(), threading.Barrier(12)
    hub.asked.clear()

    def ask(_: int) -> Path | str:
        start.wait(WAIT)
        try:
            return bases.find(EVE).path
        except ModelUnavailable as error:
            return error.detail

    with ThreadPoolExecutor(12) as pool:
        answers = set(pool.map(ask, range(12)))
    return len(hub.asked), answers


def test_many_first_requests_ask_the_hub_once(stocked: Hub) -> None:
    path = new_finder().find(EVE).path  # downloads
    stocked.asked.clear()
    new_finder().find(EVE)
    once = len(stocked.asked)
    assert once > 0
    assert asked_by_twelve(stocked) == (once, {path})


def test_many_first_requests_hear_of_one_refusal(hub: Hub) -> None:
    hub.answer = (404, {"X-Error-Code": "RepoNotFound"})
    asked, answers = asked_by_twelve(hub)
    assert (asked, len(answers)) == (1, 1)


def test_a_base_is_found_once_for_all_its_adapters(stocked: Hub) -> None:
    bases = new_finder()
    found = bases.find(EVE)
    stocked.asked.clear()
    assert bases.find(builders.source(EVE.base, lora="ada")) is found
    assert stocked.asked == []
    bases.clear()
    bases.find(EVE)
    assert stocked.asked


def test_a_missing_base_is_remembered_for_all_its_adapters(tmp_path: Path) -> None:
    bases, base = new_finder(), tmp_path / "base"
    ada, bo = (builders.source(base, lora=name) for name in ("ada", "bo"))
    first = reason(lambda: bases.find(ada))
    base.touch()  # from now on it is there, and no safetensors file
    assert reason(lambda: bases.find(bo)) == first
    bases.clear()
    assert reason(lambda: bases.find(bo)) != first


def test_a_broken_adapter_is_remembered_alone(base_folder: Path) -> None:
    bases = new_finder()
    ada, bo = (builders.source(base_folder, lora=name) for name in ("ada", "bo"))
    with pytest.raises(ModelUnavailable), bases.remembering_failure(ada):
        raise ModelUnavailable("ada is broken")
    assert reason(lambda: bases.find(ada)) == "ada is broken"
    assert bases.find(bo).path == base_folder


def test_a_failure_is_forgotten_after_a_while(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder, "FAILURE_MEMORY_SECONDS", 0.0)
    bases, ada = new_finder(), builders.source(base_folder)
    with pytest.raises(ModelUnavailable), bases.remembering_failure(ada):
        raise ModelUnavailable("ada is broken")
    assert bases.find(ada).path == base_folder
