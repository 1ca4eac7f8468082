"""The folders of users' own models: their versions, and what their trainings need."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from api.errors import NotFound
from api.store.disk import FREE_DATA, Disk, told
from api.store.tables import new_id
from api.store.uploads import UploadFolder
from api.whole import sync_file, sync_folder, write_whole

WEIGHTS = "pytorch_lora_weights.safetensors"
CHECKPOINT = "model.safetensors"  # a whole model as one file
INDEX = "model_index.json"  # of a whole model as a folder
ID = re.compile(r"[0-9a-f]{28}")
FILE = re.compile(r"([A-Za-z0-9][\w-]*/)?[A-Za-z0-9][\w.-]*")  # a whole model has folders in its folder
SAMPLE = "sample-"  # how the names begin of pictures that show what a version draws
PART = ".part"
PHOTOS = "photos"
WORK = "work"


class ModelFolder(Disk):
    """Keeps versions, each in a folder of its own that is whole or not there, and trainings and uploads under way.

    Args:
        data_dir: where `models/`, `trainings/` and `uploads/` are, or are made when something is kept in them.
    """

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, FREE_DATA)
        self.uploads = UploadFolder(data_dir)
        self._versions = data_dir.absolute() / "models"
        self._trainings = data_dir.absolute() / "trainings"

    def file_of(self, version_id: str, name: str) -> Path:
        """Returns where a file of a version is, or would be. Raises NotFound for what is no plain name."""
        if not ID.fullmatch(version_id) or not FILE.fullmatch(name):
            raise NotFound("there is no such file")
        return self._versions / version_id / name

    def begin(self, version_id: str) -> Path:
        """Returns an empty folder in which a version may be put together. Raises StorageFull, StorageUnavailable."""
        part = self._versions / f"{version_id}{PART}"
        with told(part):
            part.mkdir(parents=True, mode=0o700)
        return part

    def finish(self, version_id: str) -> None:
        """Makes what `begin` began the version's folder, once it is on the disk. Raises as `begin` does."""
        part = self._versions / f"{version_id}{PART}"
        with told(part):
            for file in part.rglob("*"):
                if file.is_file():
                    sync_file(file)
            part.replace(self._versions / version_id)
            sync_folder(self._versions)

    def weights_of(self, version_id: str) -> Path:
        """Returns where a version's weights are, or would be."""
        return self.file_of(version_id, WEIGHTS)

    def keep(self, version_id: str, files: Mapping[str, bytes | Path]) -> None:
        """Keeps the files of a version, or copies of them, all or none.

        Raises:
            StorageFull: the disk has no room.
            StorageUnavailable: the folder cannot be written to.
        """
        _keep_whole(self._versions / version_id, files.items())

    def delete(self, version_id: str) -> bool:
        """Removes a version's files; returns whether they were there. Raises StorageUnavailable when they stay."""
        return _remove(self._versions / version_id)

    @contextmanager
    def collecting(self) -> Iterator[Path]:
        """Gives an empty folder for photos inside the block, and removes it on every way out.

        What a crash leaves of it is swept as what belongs to no training. Raises StorageFull, StorageUnavailable.
        """
        part = self._trainings / f"{new_id()}{PART}"
        with told(part):
            part.mkdir(parents=True, mode=0o700)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)  # what stays is swept, too

    def keep_photos(self, job_id: str, photos: Iterable[tuple[str, bytes]]) -> None:
        """Keeps the photos (PNG) of a training by their names, all of them or none; one is in memory.

        Raises as `keep` does.
        """
        _keep_whole(self._trainings / job_id / PHOTOS, photos)

    def photos_of(self, job_id: str) -> list[bytes]:
        """Returns the photos of a training. Raises NotFound when they are gone."""
        return [photo for _, photo in self.named_photos_of(job_id)]

    def named_photos_of(self, job_id: str) -> Iterator[tuple[str, bytes]]:
        """Yields the name and the content of each photo of a training. Raises NotFound when they are gone."""
        try:
            for file in sorted((self._trainings / job_id / PHOTOS).iterdir()):
                yield file.name, file.read_bytes()
        except OSError as error:
            raise NotFound("the photos of this training are not there any more") from error

    def drop_photos(self, job_id: str, names: Iterable[str]) -> None:
        """Removes photos of a training, those that are there of these names. Raises StorageUnavailable."""
        folder = self._trainings / job_id / PHOTOS
        with told(folder):
            for name in names:
                (folder / name).unlink(missing_ok=True)

    def work_of(self, job_id: str) -> Path:
        """Returns the folder where a training keeps its states; makes it. Raises StorageFull, StorageUnavailable."""
        folder = self._trainings / job_id / WORK
        with told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def end_training(self, job_id: str, keep_photos: bool = False) -> bool:
        """Removes what a training needed; returns whether it was there. Raises StorageUnavailable when it stays."""
        return _remove(self._trainings / job_id / WORK if keep_photos else self._trainings / job_id)

    def versions(self) -> dict[str, float]:
        """Returns the ids of all versions that have files, also of those not whole, and their ages in seconds."""
        return dict(_ages(self._versions))

    def trainings(self) -> dict[str, float]:
        """Returns the ids of all trainings that have files, and their ages in seconds."""
        return dict(_ages(self._trainings))


def sha256(content: bytes | Path) -> str:
    """Returns the SHA-256 in hexadecimal, also of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> dict[str, Path]:
    """Returns the files of a model's folder by their names in it."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def model_files(names: Iterable[str]) -> list[str]:
    """Returns which of a version's files it is loaded from: one of weights, or all of a whole model's folder."""
    found = sorted(name for name in names if not name.startswith(SAMPLE))
    return next(([name] for name in (WEIGHTS, CHECKPOINT) if name in found), found)


def model_sha256(hashes: Mapping[str, str]) -> str:
    """Returns the hash of a version's weights, of the hashes of its files."""
    names = model_files(hashes)
    one = len(names) == 1
    return hashes[names[0]] if one else sha256(repr([(name, hashes[name]) for name in names]).encode())


def _keep_whole(folder: Path, files: Iterable[tuple[str, bytes | Path]]) -> None:
    """Writes a folder under another name, and gives it its own once all is on the disk."""
    part = folder.with_name(folder.name + PART)
    with told(folder):
        try:
            shutil.rmtree(part, ignore_errors=True)  # of somebody who died over it
            part.mkdir(parents=True, mode=0o700)
            for name, content in files:
                (part / name).parent.mkdir(mode=0o700, exist_ok=True)  # a whole model has folders
                _write(part / name, content)
            part.replace(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _write(file: Path, content: bytes | Path) -> None:
    if isinstance(content, bytes):
        write_whole(file, content, mode=0o600, prefix=".")
    else:
        shutil.copyfile(content, file)
        file.chmod(0o600)
        sync_file(file)


def _remove(folder: Path) -> bool:
    part = folder.with_name(folder.name + PART)
    with told(folder):
        there = folder.exists() or part.exists()
        if folder.exists():
            shutil.rmtree(part, ignore_errors=True)  # of an earlier try
            with suppress(FileNotFoundError):  # several may remove it at once
                folder.replace(part)  # gone at once for whoever would read it
        shutil.rmtree(part, onerror=_unless_gone)
    return there


def _unless_gone(_: object, path: str, error: tuple[Any, BaseException, Any]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _ages(folder: Path) -> Iterator[tuple[str, float]]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.removesuffix(PART)
            if ID.fullmatch(name):
                with suppress(FileNotFoundError):  # somebody removed it meanwhile
                    yield name, time.time() - entry.stat(follow_symlinks=False).st_mtime
