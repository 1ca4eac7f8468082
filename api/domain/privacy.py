"""One's own data: taken along as a ZIP file, or erased from everywhere."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import anyio.to_thread
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from api.domain import audit, jobs, keys, library, registry, resumable, users
from api.domain.accounts import Caller
from api.domain.registry import Registry
from api.domain.wake import Wake
from api.domain.worker import BEAT
from api.domain.zips import Pipe, added, entry
from api.errors import DatabaseUnavailable, NotFound
from api.model_service import ModelService
from api.store import tables
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.tables import Answer, Audit, Request, Usage, User
from api.store.vault import Vault

ROWS_AT_ONCE = 200
ERASED = "user.erased"  # in the audit
FORGET_SECONDS = 5.0  # between looks for users that other processes erased
END_SECONDS = 10.0  # that jobs under way are given to stop
ACCOUNT = ("id", "name", "login", "type", "disabled", "limits", "created_at")
REQUEST = (
    "id", "kind", "status", "training", "sensitive", "parameters", "tags", "category", "model_id", "webhook_url",
    "idempotency_key", "priority", "deadline", "attempt", "cache_hit", "lane", "timings", "warnings",
    "error_code", "error_detail", "error_hint", "created_at", "started_at", "finished_at",
)  # fmt: skip
USAGE = ("request_id", "images", "steps", "seconds", "cost", "created_at")

Page = Callable[[AsyncSession, str], Awaitable[list[tuple[str, dict[str, Any]]]]]
"""A session and the id after which to begin → some of (id, record); none at the end."""


async def export(
    database: Database, pictures: PictureFolder, vault: Vault, own: Registry, caller: Caller, user_id: str
) -> AsyncIterator[bytes]:
    """Returns the parts of a ZIP file with all that is kept about a user; never more than a part is in memory.

    Prompts that are sensitive are open in it for their owner; the secrets of keys are not in it.

    Raises:
        NotFound: there is no such user.
    """
    async with database.transaction() as session:
        user = await session.get(User, user_id)
        if user is None or not caller.may_see(user_id):
            raise NotFound(f"there is no user {user_id}")
        theirs = [key.model_dump(mode="json") for key in await keys.list_keys(session, user_id)]
        await audit.append(session, caller.name, "user.exported", f"user:{user_id}")
    return _zip(database, pictures, vault, own, caller, user, theirs)


async def _zip(
    database: Database,
    pictures: PictureFolder,
    vault: Vault,
    own: Registry,
    caller: Caller,
    user: User,
    theirs: list[dict[str, Any]],
) -> AsyncIterator[bytes]:
    pipe = Pipe()
    with ZipFile(pipe, "w") as archive:
        archive.writestr(entry("account.json"), _json({name: getattr(user, name) for name in ACCOUNT}))
        archive.writestr(entry("keys.json"), _json(theirs))
        lists: dict[str, Page] = {
            "requests.json": _requests(vault, caller, user.id),
            "images.json": _images(pictures, vault, caller, user.id),
            "usage.json": _usage(user.id),
        }
        for name, page in lists.items():
            async with aclosing(_list(database, archive, pipe, name, page)) as parts:
                async for part in parts:
                    yield part
        last = ""
        while found := await _pictures(database, user.id, last):
            for _, name, made in found:
                with suppress(NotFound):  # its record says so
                    path = pictures.path_of(name)
                    async with aclosing(_file(path, archive, pipe, f"pictures/{name}", made)) as parts:
                        async for part in parts:
                            yield part
            last = found[-1][0]
        async with aclosing(_models(own, archive, pipe, caller, user.id)) as parts:
            async for part in parts:
                yield part
    yield pipe.take()


async def _models(own: Registry, archive: ZipFile, pipe: Pipe, caller: Caller, user_id: str) -> AsyncGenerator[bytes]:
    """Writes the records of a user's own models with all versions, and the files of those."""
    models = [model for model in await registry.page(own, caller, user_id) if model.status != "configured"]
    made = {model.id: await registry.versions(own, caller, model.id) for model in models}
    records = [
        model.model_dump(mode="json") | {"made": [version.model_dump(mode="json") for version in made[model.id]]}
        for model in models
    ]
    archive.writestr(entry("models.json"), _json(records))
    for model in models:
        for version in made[model.id]:
            for name in version.files:
                with suppress(NotFound):  # its record says so
                    path, _ = await registry.file_of(own, caller, model.id, version.version, name)
                    inside = f"models/{model.name}/{version.version}/{name}"
                    async with aclosing(_file(path, archive, pipe, inside, version.created_at)) as parts:
                        async for part in parts:
                            yield part


async def _list(database: Database, archive: ZipFile, pipe: Pipe, name: str, page: Page) -> AsyncGenerator[bytes]:
    """Writes the records of all pages as one JSON list."""
    last, mark = "", "[\n"
    with archive.open(entry(name), "w") as file:
        while True:
            async with database.reading() as session:
                records = await page(session, last)
            if not records:
                break
            for _, record in records:
                file.write(f"{mark}{_json(record)}".encode())
                mark = ",\n"
            yield pipe.take()
            last = records[-1][0]
        file.write(b"[]\n" if mark == "[\n" else b"\n]\n")
    yield pipe.take()


async def _file(path: Path, archive: ZipFile, pipe: Pipe, name: str, made: datetime) -> AsyncGenerator[bytes]:
    with suppress(FileNotFoundError):  # its record says so
        async with aclosing(added(path, archive, pipe, name, made)) as parts:
            async for part in parts:
                yield part


def _requests(vault: Vault, caller: Caller, user_id: str) -> Page:
    async def page(session: AsyncSession, last: str) -> list[tuple[str, dict[str, Any]]]:
        found = select(Request).where(Request.user_id == user_id, Request.id > last).order_by(Request.id)
        return [
            (
                row.id,
                {name: getattr(row, name) for name in REQUEST}
                | {
                    "prompt": library.readable(vault, caller, user_id, row.sensitive, row.description),
                    "negative_prompt": library.readable(vault, caller, user_id, row.sensitive, row.negative_prompt),
                },
            )
            for row in await session.scalars(found.limit(ROWS_AT_ONCE))
        ]

    return page


def _images(pictures: PictureFolder, vault: Vault, caller: Caller, user_id: str) -> Page:
    async def page(session: AsyncSession, last: str) -> list[tuple[str, dict[str, Any]]]:
        found = await library.after(session, vault, caller, user_id, last, ROWS_AT_ONCE)
        there = await anyio.to_thread.run_sync(lambda: [pictures.path_of(image.file_path).is_file() for image in found])
        return [
            (
                image.id,
                image.model_dump(mode="json") | {"file": f"pictures/{image.file_path}" if is_there else None},
            )
            for image, is_there in zip(found, there, strict=True)
        ]

    return page


def _usage(user_id: str) -> Page:
    async def page(session: AsyncSession, last: str) -> list[tuple[str, dict[str, Any]]]:
        found = select(Usage).where(Usage.user_id == user_id, Usage.request_id > last).order_by(Usage.request_id)
        rows = await session.scalars(found.limit(ROWS_AT_ONCE))
        return [(row.request_id, {name: getattr(row, name) for name in USAGE}) for row in rows]

    return page


async def _pictures(database: Database, user_id: str, last: str) -> list[tuple[str, str, datetime]]:
    columns = select(tables.Image.id, tables.Image.image_url, tables.Image.created_at)
    found = columns.where(tables.Image.user_id == user_id, tables.Image.id > last).order_by(tables.Image.id)
    async with database.reading() as session:
        return [(row[0], row[1], row[2]) for row in await session.execute(found.limit(ROWS_AT_ONCE))]


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda moment: moment.isoformat(), ensure_ascii=False)


async def erase(
    database: Database,
    pictures: PictureFolder,
    vault: Vault,
    own: Registry,
    caller: Caller,
    user_id: str,
) -> None:
    """Erases a user: jobs, pictures, keys, files, models in memory. Usage stays, under a name that tells nobody.

    Raises:
        NotFound: there is no such user that the caller may see.
        Conflict: nobody would be left to administrate.
    """
    async with database.transaction() as session:
        await _to_be_erased(session, caller, user_id)
    await _end_jobs(database, own.wake, user_id)
    async with database.transaction() as session:
        await _to_be_erased(session, caller, user_id)
        await jobs.cancel_all(session, user_id)  # holds them: who publishes one refers to the user, and goes first
        images = list(await session.scalars(select(tables.Image.image_url).where(tables.Image.user_id == user_id)))
        theirs = list(await session.scalars(select(tables.Model.id).where(tables.Model.user_id == user_id)))
        gone = await registry.gone_with(session, theirs)
        await session.execute(delete(User).where(User.id == user_id))  # and, by cascade, all that is theirs
        await session.execute(delete(Answer).where(or_(Answer.caller == user_id, Answer.subject == user_id)))
        nobody = f"~{vault.digest(user_id.encode())[:24]}"  # no user's id begins so
        await session.execute(update(Usage).where(Usage.user_id == user_id).values(user_id=nobody))
        await audit.append(session, caller.name, ERASED, f"user:{user_id}", images=len(images), versions=gone.versions)
    # Besides what rows knew: what a worker wrote that lost its job meanwhile.
    written = await anyio.to_thread.run_sync(lambda: list(pictures.pictures_older_than(0)))
    await library.delete_files(pictures, {*images, *(name for name, user, _ in written if user == user_id)})
    await registry.forget(own, gone)
    await resumable.erase(own.folder.uploads, user_id)
    await anyio.to_thread.run_sync(own.models.forget, user_id)


async def keep_forgetting(database: Database, models: ModelService) -> None:
    """Drops the models that other processes erase, or whose consent they take back, until it is cancelled."""
    async with database.reading() as session:
        last = await session.scalar(select(func.max(Audit.seq))) or 0
    while True:
        await asyncio.sleep(FORGET_SECONDS)
        with suppress(DatabaseUnavailable):  # what was erased meanwhile is seen the next time
            last = await forget_erased(database, models, last)


async def forget_erased(database: Database, models: ModelService, last: int) -> int:
    """Drops the models that went out of use since line `last` of the audit; returns its last line now."""
    later = select(Audit.seq, Audit.action, Audit.object, Audit.detail).where(Audit.seq > last).order_by(Audit.seq)
    async with database.reading() as session:
        lines = (await session.execute(later)).all()
    for _, action, object, detail in lines:
        if action in (ERASED, *registry.OUT_OF_USE):
            await anyio.to_thread.run_sync(models.revoke, detail.get("versions", []))
        if action == ERASED:
            await anyio.to_thread.run_sync(models.forget, object.removeprefix("user:"))
    return lines[-1].seq if lines else last


async def _to_be_erased(session: AsyncSession, caller: Caller, user_id: str) -> None:
    """Holds the user's row. Raises NotFound and Conflict as `erase` does."""
    user = await session.get(User, user_id, with_for_update={"key_share": True})
    if user is None or not caller.may_see(user_id):
        raise NotFound(f"there is no user {user_id}")
    if user.type == "admin" and not user.disabled:
        await users.stays_administrated(session, user_id)


async def _end_jobs(database: Database, wake: Wake, user_id: str) -> None:
    """Cancels a user's jobs and waits a little for those that run to stop."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        async with database.transaction() as session:
            ended, running = await jobs.cancel_all(session, user_id)
        for topic in (*ended, *running, BEAT):
            wake.wake(topic)
        if not running or time.monotonic() >= deadline:
            return
        await asyncio.sleep(0.2)
