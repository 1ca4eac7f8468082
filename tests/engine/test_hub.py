"""A model of the hub in a folder: what is fetched of a repository, and what is told when nothing can be."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.engine import hub as engine_hub
from api.engine.hub import choose, fetch
from api.errors import Forbidden, InvalidRequest, ModelUnavailable, NotFound, ShuttingDown, SitterError
from tests import builders
from tests.hub import COMMIT, Hub, ask

LORA = "pytorch_lora_weights.safetensors"
NAME = "somebody/model"
JUNK = ("README.md", "pytorch_model.bin", "model.ckpt", "run.py", ".gitattributes", "pictures/a.png")


def fetched(into: Path, wanted: str | None = None, most: int = 10**9, **more: Any) -> dict[str, bytes]:
    """What is in the folder afterwards."""
    given: dict[str, Any] = {"name": NAME, "revision": COMMIT, "check": lambda: None, **more}
    into.mkdir(exist_ok=True)
    settings = builders.settings(hub_timeout_seconds=5.0, hf_token="secret")
    fetch(wanted=wanted, into=into, most=most, settings=settings, **given)
    return {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}


def test_of_a_whole_model_known_files_alone_are_fetched(stocked: Hub, base_folder: Path, tmp_path: Path) -> None:
    stocked.files |= dict.fromkeys((*JUNK, "unet/run.py", "safety_checker/model.safetensors", LORA), b"not wanted")
    files = {path: path.read_bytes() for path in base_folder.rglob("*") if path.is_file()}
    named = {str(path.relative_to(base_folder)): content for path, content in files.items()}
    assert fetched(tmp_path / "part") == named
    assert stocked.tokens == {"Bearer secret"}
    assert not any("not wanted" in asked or asked.endswith((".bin", ".py", ".ckpt")) for asked in stocked.asked)


def test_of_a_lora_its_files_alone_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = dict.fromkeys((*JUNK, "adapter_model.safetensors", "adapter_config.json", "last.safetensors"), b"{}")
    assert fetched(tmp_path / "part").keys() == {"adapter_model.safetensors", "adapter_config.json"}


def test_the_only_file_is_the_model_and_of_several_one_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = dict.fromkeys(JUNK, b"junk") | {"eve.safetensors": b"eve"}
    assert fetched(tmp_path / "one") == {LORA: b"eve"}
    hub.files["other.safetensors"] = b"other"
    assert fetched(tmp_path / "named", "other.safetensors") == {LORA: b"other"}
    with pytest.raises(InvalidRequest, match="has 2 models") as caught:
        fetched(tmp_path / "several")
    assert caught.value.hint == "Name one as `filename`: eve.safetensors, other.safetensors."


@pytest.mark.parametrize("wanted", ["model.ckpt", "run.py", "nothing.safetensors", "../eve.safetensors", "", "a/b"])
def test_nothing_else_can_be_named(wanted: str) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        choose([*JUNK, "eve.safetensors", "a/b.safetensors"], wanted)


def test_a_repository_of_pickles_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="0 models") as caught:
        choose(JUNK)
    assert "never a pickle" in caught.value.hint


SAYS_NO: dict[str, tuple[tuple[int, dict[str, str]], type[SitterError], str]] = {
    "no such model": ((404, {"X-Error-Code": "RepoNotFound"}), NotFound, "the hub has no model somebody/model"),
    "no such commit": ((404, {"X-Error-Code": "RevisionNotFound"}), NotFound, "has no commit 0123"),
    "gated": ((403, {"X-Error-Code": "GatedRepo"}), Forbidden, "asks for permission"),
    "forbidden": ((403, {}), Forbidden, "refuses to hand out"),
    "wrong token": ((401, {}), Forbidden, "refuses to hand out"),
    "down": ((500, {}), ModelUnavailable, "does not answer"),
    "hangs up": ((0, {}), ModelUnavailable, "does not answer"),
    "something else": ((200, {}), ModelUnavailable, "does not answer"),
}


@pytest.mark.parametrize(("answer", "kind", "reason"), SAYS_NO.values(), ids=SAYS_NO)
def test_it_is_told_why_the_hub_says_no(
    hub: Hub, tmp_path: Path, answer: tuple[int, dict[str, str]], kind: type[SitterError], reason: str
) -> None:
    hub.answer = answer
    with pytest.raises(kind, match=reason):
        fetched(tmp_path / "part")
    assert hub.asked


def test_no_hub_at_all_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, so that nobody else takes it, and not listening
        closed.bind(("127.0.0.1", 0))
        ask(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        with pytest.raises(ModelUnavailable, match="does not answer"):
            fetched(tmp_path / "part")


def test_another_commit_than_the_hub_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files = {LORA: b"eve"}
    with pytest.raises(NotFound, match="no commit ffff"):
        fetched(tmp_path / "part", revision="f" * 40)
    assert not list((tmp_path / "part").iterdir())


def test_what_is_larger_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files = {LORA: b"x" * 1001}
    with pytest.raises(InvalidRequest, match="larger"):
        fetched(tmp_path / "part", most=1000)
    assert not any("resolve" in asked for asked in hub.asked)


def test_a_hub_that_lies_about_a_size_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.sizes = {LORA: b"x" * 1001}, {LORA: 1}
    with pytest.raises(InvalidRequest, match="larger"):
        fetched(tmp_path / "part", most=1000)
    with pytest.raises(ModelUnavailable, match="does not answer"):
        fetched(tmp_path / "other")


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_a_server_that_stops_ends_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.files = {LORA: b"x" * 1001}
    with pytest.raises(ShuttingDown):
        fetched(tmp_path / "part", check=raising(ShuttingDown("the server is stopping")))


def test_a_full_disk_is_the_disks_fault(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {LORA: b"x" * 1001}
    monkeypatch.setattr(engine_hub._Bounded, "write", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(OSError, match="No space"):
        fetched(tmp_path / "part")
