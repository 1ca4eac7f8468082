import errno
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Barrier

import pytest

from api.errors import StorageFull, StorageUnavailable
from api.store import files
from api.store.files import PictureFolder

NOON = datetime(2025, 1, 7, 14, 30, 22)
WRITERS = 20


def names(folder: Path) -> set[str]:
    """Everything in the folder, hidden leftovers included."""
    return {path.name for path in folder.iterdir()}


def test_names_say_the_user_and_the_time(tmp_path: Path) -> None:
    (path,) = PictureFolder(tmp_path / "new" / "folder").save_all("user_123", [b"png"], NOON)
    assert path == tmp_path / "new/folder/user_123_20250107_143022.png"
    assert path.read_bytes() == b"png"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == {path.name}


def test_the_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = PictureFolder(Path("output")).save_all("a", [b"png"], NOON)
    assert path == tmp_path / "output/a_20250107_143022.png"


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    paths = folder.save_all("a", [b"1", b"2"], NOON) + folder.save_all("a", [b"3"], NOON)
    assert [path.stem for path in paths] == ["a_20250107_143022", "a_20250107_143022_2", "a_20250107_143022_3"]
    assert [path.read_bytes() for path in paths] == [b"1", b"2", b"3"]


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a_20250107_143022.png").write_bytes(b"somebody else's")
    PictureFolder(tmp_path).save_all("a", [b"mine"], NOON)
    assert (tmp_path / "a_20250107_143022.png").read_bytes() == b"somebody else's"


def test_two_hundred_pictures_in_one_second_are_all_kept_whole(tmp_path: Path) -> None:
    pictures = [bytes([number]) * 50_000 for number in range(200)]
    start = Barrier(WRITERS)

    def save(writer: int) -> list[Path]:
        start.wait(30)
        folder = PictureFolder(tmp_path)
        return [folder.save_all("a", [picture], NOON)[0] for picture in pictures[writer::WRITERS]]

    with ThreadPoolExecutor(WRITERS) as pool:
        paths = [path for saved in pool.map(save, range(WRITERS)) for path in saved]
    assert names(tmp_path) == {path.name for path in paths}
    assert len(names(tmp_path)) == 200
    assert {path.read_bytes() for path in paths} == set(pictures)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk with room for files of `size` bytes only: the kernel refuses the rest, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "pictures", [[b"x" * 5000], [b"fits", b"x" * 5000], [b"fits", b"too", b"x" * 5000, b"never"]], ids=len
)
def test_a_full_disk_keeps_all_pictures_or_none(tmp_path: Path, pictures: list[bytes]) -> None:
    folder = PictureFolder(tmp_path)
    folder.save_all("a", [b"before"], NOON)
    with largest_file(4096), pytest.raises(StorageFull, match="is full") as caught:
        folder.save_all("a", pictures, NOON)
    assert caught.value.status == 507
    assert names(tmp_path) == {"a_20250107_143022.png"}
    assert (tmp_path / "a_20250107_143022.png").read_bytes() == b"before"
    folder.save_all("a", pictures, NOON)  # room again
    assert len(names(tmp_path)) == 1 + len(pictures)


@pytest.mark.parametrize("number", sorted(files.NO_ROOM))
@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "tempfile.mkstemp", "os.fsync", "os.link"])
def test_no_room_anywhere_on_the_way_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, full)
    with pytest.raises(StorageFull):
        PictureFolder(tmp_path / "out").save_all("a", [b"png"], NOON)
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def read_only(folder: Path) -> None:
    folder.chmod(0o555)
    if os.geteuid() == 0:  # root may write everywhere
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.touch()


@pytest.fixture(params=[read_only, a_file])
def spoiled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "output"
    folder.mkdir()
    user = os.geteuid()
    try:
        request.param(folder)
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert folder.is_file() or not any(folder.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(spoiled: Path) -> None:
    with pytest.raises(StorageUnavailable, match=r"^output/ cannot be written to"):
        PictureFolder(spoiled).save_all("a", [b"png"], NOON)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_picture(spoiled: Path) -> None:
    with pytest.raises(StorageUnavailable, match=f"cannot be kept in {spoiled}: "):
        PictureFolder(spoiled).check()


def test_a_good_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "new" / "folder").check()
    assert names(tmp_path / "new/folder") == set()


def test_a_disk_without_hard_links_keeps_pictures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    paths = PictureFolder(tmp_path).save_all("a", [b"one", b"two"], NOON)
    assert [path.read_bytes() for path in paths] == [b"one", b"two"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
