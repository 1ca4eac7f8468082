"""Versions and trainings on the disk: whole or not there, whatever fails or dies in between."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from api.config import ROOT
from api.errors import NotFound, SitterError, StorageFull, StorageUnavailable
from api.store.models import PART, WEIGHTS, ModelFolder, sha256
from api.store.tables import new_id

VERSION = "0" * 27 + "1"
FILES = {WEIGHTS: bytes(range(256)) * 400, "sample-1.png": b"png", "sample-2.png": b""}
DELETERS = 8


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return ModelFolder(tmp_path / "data")


def names(path: Path) -> set[str]:
    """Everything under a folder, hidden leftovers included."""
    return {str(one.relative_to(path)) for one in path.rglob("*")}


def kept(folder: ModelFolder, version_id: str = VERSION) -> dict[str, bytes] | None:
    """The files of a version, or None when it is not there."""
    here = folder.weights_of(version_id).parent
    return {path.name: path.read_bytes() for path in here.iterdir()} if here.exists() else None


def test_a_version_is_kept(folder: ModelFolder, tmp_path: Path) -> None:
    folder.keep(VERSION, FILES)
    assert kept(folder) == FILES
    assert folder.weights_of(VERSION) == tmp_path / "data/models" / VERSION / WEIGHTS
    assert folder.weights_of(VERSION).parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.weights_of(VERSION).parent.iterdir()} == {0o600}
    assert names(tmp_path / "data/models") == {VERSION, *(f"{VERSION}/{name}" for name in FILES)}


def test_a_version_never_changes(folder: ModelFolder) -> None:
    folder.keep(VERSION, FILES)
    with pytest.raises(StorageUnavailable):
        folder.keep(VERSION, {WEIGHTS: b"other"})
    assert kept(folder) == FILES
    assert folder.versions().keys() == {VERSION}


ODD_IDS = [
    "",
    ".",
    "..",
    "x",
    VERSION[1:],
    f"{VERSION}0",
    "A" * 28,
    f"{VERSION}\n",
    f"../{VERSION}",
    f"{VERSION}{PART}",
]
ODD_NAMES = ["", ".", "..", "../secret", "/etc/passwd", ".hidden", f".{WEIGHTS}{PART}", "a/b/c.json", "a//b", "a/../b"]
ODD_NAMES += ["a\0b", "a\n", "a\\b", "a b", "~/x", "-rf", "a/", "a/.b", "\ud800", "a:b", "*", "$HOME"]


def test_no_name_but_a_plain_one_is_a_file(folder: ModelFolder) -> None:
    for version_id, name in [*((one, WEIGHTS) for one in ODD_IDS), *((VERSION, one) for one in ODD_NAMES)]:
        with pytest.raises(NotFound):
            folder.file_of(version_id, name)
    for name in (WEIGHTS, "sample-1.png", "unet/config.json", "model.fp16.safetensors", "a..b"):
        assert folder.weights_of(VERSION).parent in folder.file_of(VERSION, name).parents


def test_the_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ModelFolder(Path("data")).weights_of(VERSION).is_relative_to(tmp_path)


WRITES = [(Path, "mkdir"), (Path, "replace"), (os, "open"), (os, "fdopen"), (os, "fchmod"), (os, "fsync")]
WRITES += [(tempfile, "mkstemp")]


@contextmanager
def failing(at: int, errno: int) -> Iterator[list[str]]:
    """Lets call number `at` of those that write fail; yields what was called so far."""
    calls = list[str]()

    def stand_in(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise OSError(errno, os.strerror(errno))
            return real(*args, **named)

        return called

    with pytest.MonkeyPatch.context() as patched:
        for where, name in WRITES:
            patched.setattr(where, name, stand_in(name, getattr(where, name)))
        yield calls


@pytest.mark.parametrize("room", ["models", "trainings"])
@pytest.mark.parametrize(
    ("errno", "told"),
    [(ENOSPC, StorageFull), (EDQUOT, StorageFull), (EIO, StorageUnavailable), (EROFS, StorageUnavailable)],
)
def test_whatever_write_fails_nothing_half_is_kept(
    tmp_path: Path, errno: int, told: type[SitterError], room: str
) -> None:
    def keep(folder: ModelFolder) -> None:
        if room == "models":
            folder.keep(VERSION, FILES)
        else:
            folder.keep_photos(VERSION, FILES.items())

    (tmp_path / "whole").mkdir()
    with failing(0, errno) as calls:
        keep(ModelFolder(tmp_path / "whole"))
    whole = names(tmp_path / "whole")
    empty = {room} | ({f"{room}/{VERSION}"} if room == "trainings" else set())  # there it has a folder around it
    assert set(calls) == {name for _, name in WRITES}
    for at in range(1, len(calls) + 1):
        folder = ModelFolder(tmp_path / str(at))
        (tmp_path / str(at)).mkdir()
        with failing(at, errno) as done, pytest.raises(told):
            keep(folder)
        left = names(tmp_path / str(at))
        assert left == whole or left <= empty, (at, done[-1])
        if left != whole:
            keep(folder)  # once there is room again
        assert names(tmp_path / str(at)) == whole, (at, done[-1])


def in_a_process_of_its_own(check: Callable[[Path], None], tmp_path: Path) -> None:
    """Runs a check of this file where there are no threads, so that it may fork."""
    script = f"import sys, pathlib; from tests.store.test_models import *; {check.__name__}(pathlib.Path(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr


def forked(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    finally:
        os._exit(0)


def killed_at_each_sync(tmp_path: Path) -> None:
    fsync, wholes, at, ended = os.fsync, 0, 0, -signal.SIGKILL
    while ended:
        at += 1
        folder, left = ModelFolder(tmp_path / str(at)), itertools.count(at - 1, -1)

        def die(handle: int, left: Iterator[int] = left) -> None:
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        def keep(folder: ModelFolder = folder, die: Callable[[int], None] = die) -> None:
            os.fsync = die  # type: ignore[assignment]
            folder.keep(VERSION, FILES)

        ended = os.waitstatus_to_exitcode(os.waitpid(forked(keep), 0)[1])
        assert ended in (0, -signal.SIGKILL), ended
        assert folder.versions().keys() == {VERSION}, "whoever sweeps finds it, whole or not"
        assert kept(folder) in (None, FILES), at
        wholes += kept(folder) == FILES
        if kept(folder) is None:  # who comes next is not disturbed by what is left
            folder.keep(VERSION, FILES)
        assert kept(folder) == FILES, at
        assert folder.delete(VERSION)
        assert names(tmp_path / str(at)) == {"models"}
    assert at > 2 * len(FILES)
    assert wholes == 2  # killed after it had its name, and not killed


def killed_at_any_moment(tmp_path: Path) -> None:
    folder, chance = ModelFolder(tmp_path), random.Random(5)

    def work() -> None:
        while True:
            folder.keep(VERSION, FILES)
            folder.delete(VERSION)

    for _ in range(40):
        pid = forked(work)
        time.sleep(chance.random() / 50)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert kept(folder) in (None, FILES)
        folder.delete(VERSION)
        assert names(tmp_path) <= {"models"}


@pytest.mark.parametrize("check", [killed_at_each_sync, killed_at_any_moment])
def test_a_process_that_is_killed_leaves_nothing_that_counts(check: Callable[[Path], None], tmp_path: Path) -> None:
    in_a_process_of_its_own(check, tmp_path)


def test_a_deleted_version_is_gone(folder: ModelFolder, tmp_path: Path) -> None:
    other = new_id()
    for version_id in (VERSION, other):
        folder.keep(version_id, FILES)
    assert folder.delete(VERSION)
    assert (kept(folder), kept(folder, other)) == (None, FILES)
    assert not folder.delete(VERSION)
    assert not ModelFolder(tmp_path / "nowhere").delete(VERSION)


def test_a_deletion_that_fails_is_finished_later(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.keep(VERSION, FILES)

    def refuse(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise OSError(EIO, os.strerror(EIO))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        for _ in range(2):
            with pytest.raises(StorageUnavailable):
                folder.delete(VERSION)
            assert kept(folder) is None, "nobody reads it any more"
            assert folder.versions().keys() == {VERSION}
    assert folder.delete(VERSION)
    assert folder.versions() == {}


def test_of_several_who_delete_it_nobody_stumbles(folder: ModelFolder) -> None:
    """The sweep of each process, and whoever erases it."""
    start = Barrier(DELETERS)

    def delete(version_id: str) -> bool:
        start.wait(30)
        return folder.delete(version_id)

    with ThreadPoolExecutor(DELETERS) as pool:
        for _ in range(50):
            version_id = new_id()
            folder.keep(version_id, FILES)
            deleted = [deleting.result() for deleting in [pool.submit(delete, version_id) for _ in range(DELETERS)]]
            assert any(deleted)
            assert folder.versions() == {}


def test_ages_are_those_of_all_that_is_there(folder: ModelFolder, tmp_path: Path) -> None:
    assert folder.versions() == folder.trainings() == {}
    ids = [new_id() for _ in range(3)]
    folder.keep(ids[0], FILES)
    (folder.begin(ids[1]) / "half").write_bytes(b"")
    folder.keep_photos(ids[2], [("00.png", b"photo")])
    for name in ("notes.txt", "x" * 28, f"{ids[0]}x", f".{ids[0]}", "lost+found"):
        (tmp_path / "data/models" / name).mkdir()
    linked = new_id()
    (tmp_path / "data/models" / linked).symlink_to(tmp_path / "nowhere")
    os.utime(tmp_path / "data/models" / ids[0], (0, time.time() - 500))
    ages = folder.versions()
    assert ages.keys() == {ids[0], ids[1], linked}
    assert 500 <= ages[ids[0]] < 10_000
    assert ages[ids[1]] < 500
    assert folder.trainings().keys() == {ids[2]}


def test_a_version_is_put_together_and_then_there(folder: ModelFolder, tmp_path: Path) -> None:
    part = folder.begin(VERSION)
    (part / "unet").mkdir()
    for name in ("model_index.json", "unet/config.json"):
        (part / name).write_bytes(name.encode())
    assert kept(folder) is None
    with pytest.raises(StorageUnavailable):
        folder.begin(VERSION)  # somebody else is at it
    folder.finish(VERSION)
    assert folder.file_of(VERSION, "unet/config.json").read_bytes() == b"unet/config.json"
    assert folder.versions().keys() == {VERSION}
    inside = ("unet", "unet/config.json", "model_index.json")
    assert names(tmp_path / "data/models") == {VERSION, *(f"{VERSION}/{name}" for name in inside)}


def test_photos_are_kept_in_their_order_until_the_training_ends(folder: ModelFolder, tmp_path: Path) -> None:
    job, other = new_id(), new_id()
    photos = [bytes([number]) * 9 for number in range(20)]
    named = [(f"{number:02}.png", photo) for number, photo in enumerate(photos)]
    for job_id in (job, other):
        folder.keep_photos(job_id, reversed(named))
        (folder.work_of(job_id) / "state.safetensors").write_bytes(b"state")
    assert folder.photos_of(job) == photos
    assert folder.end_training(job, keep_photos=True)
    assert folder.photos_of(job) == photos
    assert not folder.end_training(job, keep_photos=True)
    assert folder.end_training(other)
    with pytest.raises(NotFound):
        folder.photos_of(other)
    files = [f"{job}/photos/{number:02}.png" for number in range(20)]
    assert names(tmp_path / "data/trainings") == {job, f"{job}/photos", *files}


def test_photos_that_are_found_wanting_go_and_the_others_stay(folder: ModelFolder) -> None:
    job = new_id()
    folder.keep_photos(job, [(f"{number:02}.png", b"photo") for number in range(4)])
    for _ in range(2):  # once more after a crash
        folder.drop_photos(job, ["01.png", "03.png", "99.png"])
        assert [name for name, _ in folder.named_photos_of(job)] == ["00.png", "02.png"]


def test_photos_are_collected_for_a_moment_alone(folder: ModelFolder) -> None:
    with pytest.raises(ValueError, match="no"), folder.collecting() as place:  # noqa: PT012
        (place / "00.png").write_bytes(b"photo")
        assert place.stat().st_mode & 0o777 == 0o700
        [training] = folder.trainings()  # as which it is swept, should this process die now
        assert place.name == f"{training}{PART}"
        raise ValueError("no")
    assert folder.trainings() == {}


def test_a_hash_is_that_of_the_bytes() -> None:
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
