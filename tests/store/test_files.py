import asyncio
import errno
import io
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, Event

import pytest
from PIL import Image

from api.errors import NotFound, StorageFull, StorageUnavailable
from api.store import disk, files
from api.store.files import PictureFolder
from api.whole import NO_ROOM, write_whole

NAME = "user_123_20250107_143022_93f21d07.png"
WRITERS = 8


def names(folder: Path) -> set[str]:
    """Everything in the folder, hidden leftovers included."""
    return {path.name for path in folder.iterdir()}


def png_of(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 50).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_saved_under_its_name(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path / "new" / "folder")
    path = folder.save(NAME, b"png")
    assert path == folder.path_of(NAME) == tmp_path / "new/folder" / NAME
    assert path.read_bytes() == folder.read(NAME) == b"png"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == {NAME}


def test_the_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PictureFolder(Path("output")).save("a.png", b"png") == tmp_path / "output/a.png"


def test_the_same_job_again_replaces_its_picture(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME, b"first")
    folder.save(NAME, b"again")
    assert folder.read(NAME) == b"again"
    assert names(tmp_path) == {NAME}


def test_a_reader_sees_one_whole_picture_or_the_other(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    pictures = [bytes([number]) * 100_000 for number in range(WRITERS)]
    folder.save(NAME, pictures[0])
    start, done = Barrier(WRITERS), Event()

    def write(picture: bytes) -> None:
        start.wait(30)
        for _ in range(5):
            folder.save(NAME, picture)

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(folder.read(NAME))
        return seen

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reading = pool.submit(read)
        for writing in [pool.submit(write, picture) for picture in pictures]:
            writing.result()
        done.set()
        assert reading.result() <= set(pictures)
    assert names(tmp_path) == {NAME}


def test_a_deleted_picture_is_gone(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME, b"png")
    folder.delete(NAME)
    assert not names(tmp_path)
    folder.delete(NAME)
    with pytest.raises(NotFound):
        folder.read(NAME)


OUTSIDE = ["", ".", "..", "../secret", "a/../../secret", "{absolute}", "./a.png", "a//b.png", "a/..", "out", "x\0.png"]
OUTSIDE += ["link/secret", "secret_link", "..\\secret", "a/"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_folder_is_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "out"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    (inside / "secret_link").symlink_to(tmp_path / "secret")
    (inside / "out").symlink_to(inside)
    folder = PictureFolder(inside)
    name = name.format(absolute=tmp_path / "secret")
    for touch in (folder.path_of, folder.read, folder.delete, lambda name: folder.save(name, b"png")):
        with pytest.raises(NotFound):
            touch(name)
    assert (tmp_path / "secret").read_text() == "secret"
    assert names(tmp_path) == {"secret", "out"}


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "output").symlink_to(tmp_path / "disk")
    folder = PictureFolder(tmp_path / "output")
    folder.save("2025/01/a.png", b"png")
    assert folder.read("2025/01/a.png") == b"png"


def test_free_room_is_that_of_the_disk(tmp_path: Path) -> None:
    there = os.statvfs(tmp_path)
    free = PictureFolder(tmp_path / "not" / "yet").free_bytes()
    assert free == pytest.approx(there.f_bavail * there.f_frsize, rel=0.05)


def test_old_pictures_are_told_from_what_is_not_ours(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    ours = {
        NAME: ("user_123", "93f21d07"),
        "a_b@c.d_20250107_143022_b1946ac93f21d07e_4.png": ("a_b@c.d", "b1946ac93f21d07e"),
        f"a_20250107_143022_deadbeef_{NAME}": ("a_20250107_143022_deadbeef_user_123", "93f21d07"),
    }
    others = [
        "a_20250107_143022.png", "a_20250107_143022_2.png", "me.png", ".hidden.png",
        "u_20250107_143022_20250107_143022.png", f"{NAME}.txt", ".picture-x.part",
    ]  # fmt: skip
    young = "a_20250107_143022_00000001.png"
    for name in (*ours, *others, young):
        (tmp_path / name).touch()
        if name != young:
            os.utime(tmp_path / name, (time.time() - 100,) * 2)
    (tmp_path / "a_20250107_143022_00000002.png").mkdir()
    assert {name: (user, job) for name, user, job in folder.pictures_older_than(60)} == ours
    assert folder.delete_parts_older_than(1000) == 0
    assert folder.delete_parts_older_than(60) == 1
    assert not (tmp_path / ".picture-x.part").exists()
    assert not list(PictureFolder(tmp_path / "nowhere").pictures_older_than(0))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk with room for files of `size` bytes only: the kernel refuses the rest, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME, b"before")
    with largest_file(4096), pytest.raises(StorageFull, match="is full") as caught:
        folder.save(NAME, b"x" * 5000)
    assert caught.value.status == 507
    assert names(tmp_path) == {NAME}
    assert folder.read(NAME) == b"before"
    folder.save(NAME, b"x" * 5000)  # room again
    assert folder.read(NAME) == b"x" * 5000


@pytest.mark.parametrize("number", sorted(NO_ROOM))
@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "tempfile.mkstemp", "os.fsync", "pathlib.Path.replace"])
def test_no_room_anywhere_on_the_way_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(call, full)
    with pytest.raises(StorageFull):
        PictureFolder(tmp_path / "out").save(NAME, b"png")
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
    with pytest.raises(StorageUnavailable, match="output/ cannot be written to"):
        PictureFolder(spoiled).save(NAME, b"png")


def test_a_folder_that_cannot_be_written_is_told_before_the_first_picture(spoiled: Path) -> None:
    with pytest.raises(StorageUnavailable, match=f"cannot be kept in {spoiled}: "):
        PictureFolder(spoiled).check()


def test_a_good_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "new" / "folder").check()
    assert names(tmp_path / "new/folder") == set()


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_is_made_once_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    write_whole(tmp_path / "file", b"first", 0o600, ".", replace=False)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", b"second", 0o600, ".", replace=False)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == {"file"}


@pytest.mark.anyio
async def test_a_disk_that_hangs_is_told_to_all_who_ask_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "HANGING_SECONDS", 0.2)
    folder, hangs, looks = PictureFolder(tmp_path), Event(), 0

    def look() -> int:
        nonlocal looks
        looks += 1
        hangs.wait(60)
        return disk.ROOM_BYTES

    monkeypatch.setattr(folder, "free_bytes", look)
    answers = await asyncio.gather(*(folder.require_room() for _ in range(50)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {StorageUnavailable}
    assert looks == 1
    hangs.set()
    monkeypatch.setattr(disk, "LOOK_SECONDS", 0)
    await folder.require_room()


def test_a_thumbnail_is_made_once_and_goes_with_its_picture(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (512, 896), "red").save(buffer, "PNG")
    folder.save(NAME, buffer.getvalue())
    small = folder.thumbnail(NAME)
    with Image.open(small) as picture:
        assert (picture.format, picture.size) == ("WEBP", (219, 384))
    first = small.stat().st_ino
    assert folder.thumbnail(NAME).stat().st_ino == first
    folder.delete(NAME)
    assert names(tmp_path) == set()
    with pytest.raises(NotFound):
        folder.thumbnail(NAME)


def test_a_thumbnail_that_is_made_meanwhile_goes_with_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME, png_of(64))
    unlink, looks = Path.unlink, [NAME]

    def then_somebody_looks(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        with suppress(NotFound):
            folder.thumbnail(looks.pop()) if looks else None

    monkeypatch.setattr(Path, "unlink", then_somebody_looks)
    folder.delete(NAME)
    assert not looks
    assert not names(tmp_path)


def test_a_thumbnail_of_nothing_is_swept(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME.replace(".png", ".webp"), b"left over")
    folder.save("portrait-of-mine.webp", b"not ours")
    assert folder.delete_parts_older_than(-1) == 1
    assert names(tmp_path) == {"portrait-of-mine.webp"}


def test_a_blur_is_a_few_pixels() -> None:
    buffer = io.BytesIO()
    sky = Image.new("RGB", (512, 896), "blue")
    sky.paste("red", (0, 448, 512, 896))
    sky.save(buffer, "PNG")
    made = files.blur(buffer.getvalue())
    assert made is not None
    assert len(made) < 300
    with Image.open(io.BytesIO(made)) as small:
        assert (small.format, small.size) == ("WEBP", (5, 8))
        top, bottom = (small.convert("RGB").getpixel((2, row)) for row in (0, 7))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[2] > 150 > top[0]
    assert bottom[0] > 150 > bottom[2]
    assert files.blur(b"no picture") is None


@pytest.mark.parametrize(("at", "broken"), [(8, b"\0\0\0\5"), (33, b"\0\0\1\0")])
def test_a_picture_that_is_broken_in_any_way_has_no_thumbnail(tmp_path: Path, at: int, broken: bytes) -> None:
    png = png_of(64)
    PictureFolder(tmp_path).save(NAME, png[:at] + broken + png[at + 4 :])
    with pytest.raises(StorageUnavailable):
        PictureFolder(tmp_path).thumbnail(NAME)
    assert files.blur(png[:at] + broken + png[at + 4 :]) is None


def test_a_damaged_picture_has_no_thumbnail(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    folder.save(NAME, b"no picture")
    with pytest.raises(StorageUnavailable):
        folder.thumbnail(NAME)
    assert names(tmp_path) == {NAME}
