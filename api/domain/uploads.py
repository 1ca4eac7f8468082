"""Models that users send: put on the disk, checked in a process of their own, and only then a version."""

import errno
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import ZipFile, ZipInfo

import anyio.to_thread
from anyio import CapacityLimiter
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import ModelSource, Settings, locate
from api.domain import audit, quota
from api.domain.archives import open_archive
from api.domain.models import next_number, open_model
from api.domain.policy import granted
from api.engine.checkup import Checked, check_upload
from api.errors import DatabaseUnavailable, InvalidRequest, NotAuthenticated, NotFound, SitterError
from api.model_service import ModelService
from api.store.database import Database
from api.store.disk import Disk, told
from api.store.models import CHECKPOINT, INDEX, WEIGHTS, ModelFolder, files_in, model_sha256, sha256
from api.store.tables import Model, ModelVersion, User, new_id, now

MOST_BYTES = 8_000_000_000  # of one upload
PEFT_WEIGHTS = "adapter_model.safetensors"
COPIED_AT_ONCE = 1_000_000
INSIDE = re.compile(r"([A-Za-z0-9][\w-]*/)?[A-Za-z0-9][\w.-]*")  # a file of a model's folder, by its name in there
FREE_TEMPORARY = "Free some space where temporary files lie (TMPDIR) and send it again."
NAMES = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}  # what is wrong with a file is its name
_checks = CapacityLimiter(1)  # each takes a process and half a gigabyte
Place = Callable[[Path], None]


@dataclass(frozen=True)
class UploadOrder:
    """A model as it was sent: whose, of what, over which base, and with whose consent."""

    user_id: str
    name: str
    class_noun: str
    source: ModelSource  # of the base that it is over, or like
    granted_by: str
    consent_days: int | None = None
    origin: str | None = None  # on the hub, with its commit


async def require_room(folder: ModelFolder, more: int) -> None:
    """Looks whether `more` bytes can be kept: as they come among temporary files, and then as a model.

    Raises:
        StorageFull, StorageUnavailable: a disk has no room, or does not say.
    """
    await Disk(Path(tempfile.gettempdir()), FREE_TEMPORARY).require_room(more)
    await folder.require_room(more)


async def receive(
    settings: Settings,
    database: Database,
    folder: ModelFolder,
    models: ModelService,
    order: UploadOrder,
    place: Place,
) -> str:
    """Keeps a model that was sent, as a version that draws from now on; nothing of it if it is refused.

    Returns the id of its model.

    Args:
        settings: how much one user may keep.
        database: where the registry is.
        folder: where the files are.
        models: knows the base.
        order: what is sent.
        place: writes its files into an empty folder.

    Raises:
        InvalidRequest: with the first reason to refuse it.
        LimitReached: the user keeps too much already.
        NotFound, NotAuthenticated: there is no such user, or they are disabled.
        ModelUnavailable: the base cannot be read.
        StorageFull, StorageUnavailable, DatabaseUnavailable: nothing was kept.
    """
    version_id, is_new = new_id(), False
    try:
        part = await anyio.to_thread.run_sync(folder.begin, version_id)
        await anyio.to_thread.run_sync(_place, place, part)
        checked = await anyio.to_thread.run_sync(_checked, part, order.source, limiter=_checks)
        base_hash = await anyio.to_thread.run_sync(models.base_hash, order.source)
        files = await anyio.to_thread.run_sync(_hashes, part)
        await anyio.to_thread.run_sync(folder.finish, version_id)
        async with database.transaction() as session:
            await _hold_user(session, settings, order.user_id)
            quota.require_space(settings, await quota.kept_bytes(session, order.user_id), checked.bytes)
            model = await open_model(session, order.user_id, order.name, order.class_noun)
            is_new = await _add(session, model, order, version_id, checked, files, base_hash)
    except DatabaseUnavailable:
        raise  # it may be written all the same; what is not is swept
    except SitterError:
        await anyio.to_thread.run_sync(folder.delete, version_id)
        raise
    if not is_new:
        await anyio.to_thread.run_sync(folder.delete, version_id)
    return model.id


def named(name: str, sent: IO[bytes]) -> Place:
    """Returns what writes what was sent, a ZIP or one file, as its name says."""
    return unpacked(sent) if name.lower().endswith(".zip") else placed(name, sent)


def placed(name: str, sent: IO[bytes]) -> Place:
    """Returns what writes one file that was sent, under a name of ours."""
    if not name.endswith(".safetensors"):
        raise InvalidRequest("a model is one .safetensors file, or a ZIP of a folder", "Never a pickle (.ckpt, .pt).")

    def place(part: Path) -> None:
        with (part / WEIGHTS).open("wb") as file:
            shutil.copyfileobj(sent, file, COPIED_AT_ONCE)

    return place


def matching(place: Place, sent: IO[bytes], sha256: str | None) -> Place:
    """Returns what writes as `place` does, if what was sent has this hash, where one is said."""
    if sha256 is None:
        return place

    def compared(part: Path) -> None:
        sent.seek(0)
        if hashlib.file_digest(sent, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
            raise InvalidRequest("what came has another SHA-256 than you say", "Send it again.")
        sent.seek(0)
        place(part)

    return compared


def unpacked(sent: IO[bytes]) -> Place:
    """Returns what writes the files of a ZIP that was sent; a folder around all of them is left away."""

    def place(part: Path) -> None:
        with open_archive(sent) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            tops = {entry.filename.partition("/")[0] for entry in entries}
            around = len(tops) == 1 and all("/" in entry.filename for entry in entries)
            left = MOST_BYTES
            for entry in entries:
                name = entry.filename.partition("/")[2] if around else entry.filename
                if not INSIDE.fullmatch(name):
                    raise InvalidRequest("the archive holds a file that no model has", "Pack the model's folder alone.")
                try:
                    (part / name).parent.mkdir(exist_ok=True)
                    left -= _unpack(archive, entry, part / name, left)
                except OSError as error:
                    if error.errno not in NAMES:
                        raise
                    raise InvalidRequest("the archive holds two files of one name, or one too long") from error

    return place


def _unpack(archive: ZipFile, name: ZipInfo, file: Path, most: int) -> int:
    """Writes one file, and returns its bytes. Raises InvalidRequest when there are more than `most`."""
    written = 0
    with archive.open(name) as packed, file.open("xb") as out:
        while piece := packed.read(COPIED_AT_ONCE):
            written += len(piece)
            if written > most:
                raise InvalidRequest(f"the archive holds over {MOST_BYTES:,} bytes", "Send a smaller model.")
            out.write(piece)
    return written


def _place(place: Place, part: Path) -> None:
    with told(part):
        place(part)


def _checked(part: Path, source: ModelSource) -> Checked:
    """Returns what was sent; gives the only file of a whole model the name of one."""
    one = part / WEIGHTS
    is_folder = (part / INDEX).exists() or not one.exists() or len(list(part.iterdir())) > 1
    checked = check_upload(part if is_folder else one, source)
    if checked.kind == "full" and not is_folder:
        if not locate(source.config or source.base).is_dir():
            raise InvalidRequest(
                "over this base a checkpoint lacks its configuration", "Send the folder of the model as an archive."
            )
        one.rename(part / CHECKPOINT)
    if (peft := part / PEFT_WEIGHTS).exists():
        peft.rename(one)
    return checked


def _hashes(part: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file, by its name in the folder."""
    return {name: sha256(path) for name, path in files_in(part).items()}


async def _hold_user(session: AsyncSession, settings: Settings, user_id: str) -> None:
    """Holds the user's row. Raises NotFound or NotAuthenticated when there is none who may send a model."""
    if settings.auth == "open":
        await quota.ensure_users(session, [user_id])
    user = await session.get(User, user_id, with_for_update=True)
    if user is None:
        raise NotFound(f"there is no user {user_id}")
    if user.disabled:
        raise NotAuthenticated("this user is disabled")


async def _add(
    session: AsyncSession,
    model: Model,
    order: UploadOrder,
    version_id: str,
    checked: Checked,
    files: dict[str, str],
    base_hash: str,
) -> bool:
    """Adds a version and publishes it; one that the model has already is published alone. Returns whether it is new."""
    digest = model_sha256(files)
    consent = granted(model, order.granted_by, order.consent_days, [digest])
    session.add(consent)
    same = select(ModelVersion.id).where(ModelVersion.model_id == model.id, ModelVersion.sha256 == digest)
    known = await session.scalar(same)
    if known is None:
        version = ModelVersion(
            id=version_id,
            model_id=model.id,
            number=next_number(model),
            kind=checked.kind,
            source=order.source.model_dump(exclude_defaults=True),
            base_hash=base_hash,
            sha256=digest,
            files=files,
            bytes=checked.bytes,
            parameters={"rank": checked.rank, "layers": checked.layers}
            | ({"hub": order.origin} if order.origin else {}),
            scores={},
        )
        session.add(version)
        await session.flush()
    model.published_id, model.published_at = known or version_id, now()
    said = {"statement": consent.statement, "evidence": consent.evidence, "sha256": digest}
    await audit.append(session, order.granted_by, "model.uploaded", f"model:{model.id}", **said)
    return known is None
