"""Uploads in pieces on the disk: whose they are, where they end, who holds one, and when they are gone."""

import os
import time
from errno import EDQUOT, EIO, ENOSPC
from io import FileIO
from pathlib import Path

import pytest

from api.errors import Conflict, NotFound, SitterError, StorageFull, StorageUnavailable
from api.store import uploads
from api.store.tables import new_id
from api.store.uploads import LIFE_SECONDS, UploadFolder

ODD_IDS = ["", ".", "..", "x", "0" * 27, "0" * 29, "A" * 28, f"../{'0' * 28}", f"{'0' * 28}\n", "*", "*" * 28]


@pytest.fixture
def folder(tmp_path: Path) -> UploadFolder:
    return UploadFolder(tmp_path)


def begun(folder: UploadFolder, owner: str = "ada", length: int = 10) -> str:
    with folder.alone():
        return folder.begin(owner, length, "").id


def appended(folder: UploadFolder, upload_id: str, *pieces: bytes) -> int:
    _, file = folder.hold("ada", upload_id)
    for piece in pieces:
        folder.append(file, piece)
    folder.keep(file)
    return folder.find("ada", upload_id).offset


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "uploads").iterdir()} - {".lock"}


def aged(tmp_path: Path, seconds: float) -> None:
    for path in (tmp_path / "uploads").iterdir():
        os.utime(path, (0, time.time() - seconds))


def test_pieces_are_put_one_behind_the_other(folder: UploadFolder) -> None:
    upload_id = begun(folder)
    assert folder.find("ada", upload_id).offset == 0
    assert appended(folder, upload_id, b"abc", b"", b"d") == 4
    assert appended(folder, upload_id, b"efghij") == 10
    upload, file = UploadFolder(folder._folder.parent).hold("ada", upload_id)  # of another process
    with file:
        assert (upload.offset, upload.length) == (10, 10)
        file.seek(0)
        assert file.read() == b"abcdefghij"


def test_one_holds_it_at_a_time(folder: UploadFolder) -> None:
    upload_id = begun(folder)
    _, file = folder.hold("ada", upload_id)
    for other in (folder, UploadFolder(folder._folder.parent)):
        with pytest.raises(Conflict, match="another request"):
            other.hold("ada", upload_id)
    folder.keep(file)
    folder.hold("ada", upload_id)[1].close()


def test_it_is_its_owners_alone(folder: UploadFolder, tmp_path: Path) -> None:
    mine, theirs = begun(folder, "ada"), begun(folder, "ADA")
    assert [upload.id for upload in folder.all_of("ada")] == [mine]
    assert len({name.lower() for name in names(tmp_path)}) == 4, "on a disk that takes capitals for small letters"
    for owner, upload_id in (("bo", mine), ("ad", mine), ("ada", theirs), *(("ada", odd) for odd in ODD_IDS)):
        with pytest.raises(NotFound):
            folder.find(owner, upload_id)
        with pytest.raises(NotFound):
            folder.hold(owner, upload_id)
    folder.erase("ad")
    folder.erase("ada")
    assert folder.all_of("ada") == []
    assert [upload.id for upload in folder.all_of("ADA")] == [theirs]


def test_what_is_ended_is_gone(folder: UploadFolder, tmp_path: Path) -> None:
    upload_id = begun(folder)
    _, file = folder.hold("ada", upload_id)
    folder.end("ada", upload_id)
    folder.append(file, b"late")  # who still writes to it does no harm
    folder.keep(file)
    folder.end("ada", upload_id)
    for find in (folder.find, folder.hold):
        with pytest.raises(NotFound):
            find("ada", upload_id)
    assert names(tmp_path) == set()


def test_a_day_after_the_last_byte_it_is_swept(folder: UploadFolder, tmp_path: Path) -> None:
    assert folder.sweep() == 0  # there is no folder yet
    old, young = begun(folder), begun(folder)
    aged(tmp_path, LIFE_SECONDS + 1)
    assert folder.all_of("ada") == []
    with pytest.raises(NotFound):
        folder.hold("ada", old)
    with (tmp_path / "uploads" / f"{b'ada'.hex()}.{young}.part").open("ab") as file:
        file.write(b"x")
    assert [upload.id for upload in folder.all_of("ada")] == [young]
    assert folder.sweep() == 1
    assert names(tmp_path) == {f"{b'ada'.hex()}.{young}{kind}" for kind in (".part", ".json")}


def test_what_a_crash_left_is_swept(folder: UploadFolder, tmp_path: Path) -> None:
    begun(folder)
    for name in (f"616461.{new_id()}.part", f"616461.{new_id()}.json", ".tmpabc.part"):
        (tmp_path / "uploads" / name).write_bytes(b"{}")
    assert len(folder.all_of("ada")) == 1
    assert folder.sweep() == 0
    aged(tmp_path, LIFE_SECONDS + 1)
    assert folder.sweep() == 4
    assert names(tmp_path) == set()


@pytest.mark.parametrize(("number", "told"), [(ENOSPC, StorageFull), (EDQUOT, StorageFull), (EIO, StorageUnavailable)])
def test_what_fits_on_the_disk_stays(
    folder: UploadFolder, number: int, told: type[SitterError], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FileIO):
        def write(self, piece: object) -> int:
            if self.tell() >= 3:
                raise OSError(number, os.strerror(number))
            return super().write(bytes(piece)[:1])  # type: ignore[call-overload]

    upload_id = begun(folder)
    monkeypatch.setattr(uploads, "FileIO", Full)
    _, file = folder.hold("ada", upload_id)
    with pytest.raises(told):
        folder.append(file, b"abcdef")
    folder.keep(file)
    assert folder.find("ada", upload_id).offset == 3
    monkeypatch.undo()
    assert appended(folder, upload_id, b"defghij") == 10
