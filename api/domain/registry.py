"""What owners do with their models: look at them, rename, publish and roll back, take their consent back, erase."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import anyio.to_thread
import structlog
from sqlalchemy import delete, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import DEFAULT_USER, Settings
from api.domain import audit, jobs
from api.domain.accounts import ALL_SCOPES, Caller
from api.domain.described import configured, described, version_of
from api.domain.policy import ConsentMissing, consented
from api.domain.wake import Wake
from api.domain.worker import BEAT
from api.errors import Conflict, InvalidRequest, ModelUnavailable, NotFound, SitterError
from api.model_service import ModelService, quiet_libraries
from api.store import tables
from api.store.database import Database
from api.store.models import ModelFolder, model_files
from api.store.tables import Consent, ModelVersion, Request, User, now
from api.wire.models import Model, Version

log = structlog.get_logger()

REVOKED = "consent.revoked"  # in the audit; its detail names the versions that nobody draws with any more
EXPIRED = "consent.expired"  # likewise
ERASED = "model.erased"  # likewise
OUT_OF_USE = (REVOKED, EXPIRED, ERASED)
SWEEP = Caller("sitter:sweep", is_admin=True, scopes=ALL_SCOPES, via="open")  # what happens by itself


@dataclass(frozen=True)
class Registry:
    """What looking after models needs."""

    settings: Settings
    database: Database
    folder: ModelFolder
    models: ModelService
    wake: Wake


async def page(
    registry: Registry, caller: Caller, user_id: str | None, before: str | None = None, limit: int | None = None
) -> list[Model]:
    """Returns the models older than `before` that the caller may see, or those of one user, newest first.

    Up to `limit` of them; where that is all there are, the configured ones at the end.

    Raises:
        Forbidden: `user_id` is somebody else.
    """
    owner = caller.owner_filter(user_id)
    wanted = select(tables.Model).order_by(tables.Model.id.desc()).limit(limit)
    if owner is not None:
        wanted = wanted.where(tables.Model.user_id == owner)
    if before is not None:
        wanted = wanted.where(tables.Model.id < before)
    async with registry.database.reading() as session:
        own = await described(session, list(await session.scalars(wanted)))
    if len(own) == limit:
        return own
    users = [user for user in registry.settings.user_models if owner is None or user in (owner, DEFAULT_USER)]
    return own + [configured(registry.settings, user) for user in users]


async def find(registry: Registry, caller: Caller, model_id: str) -> Model:
    """Returns the model. Raises NotFound when there is none that the caller may see."""
    async with registry.database.reading() as session:
        return (await described(session, [await _get(session, caller, model_id)]))[0]


async def named(registry: Registry, caller: Caller, user_id: str, name: str) -> Model:
    """Returns the model that a user calls so. Raises NotFound when there is none that the caller may see."""
    wanted = select(tables.Model).where(tables.Model.user_id == user_id, tables.Model.name == name)
    async with registry.database.reading() as session:
        if caller.may_see(user_id) and (model := await session.scalar(wanted)):
            return (await described(session, [model]))[0]
    if caller.may_see(user_id) and name == DEFAULT_USER and user_id in registry.settings.user_models:
        return configured(registry.settings, user_id)
    raise NotFound("there is no such model")


async def published(registry: Registry, models: Collection[Model]) -> dict[str, Version]:
    """Returns the versions that draw, by the ids of their models, which the caller has to be allowed to see."""
    wanted = select(tables.Model, ModelVersion).join(ModelVersion, ModelVersion.id == tables.Model.published_id)
    async with registry.database.reading() as session:
        found = await session.execute(wanted.where(tables.Model.id.in_([model.id for model in models])))
        return {model.id: version_of(model, version) for model, version in found}


async def versions(
    registry: Registry, caller: Caller, model_id: str, before: int | None = None, limit: int | None = None
) -> list[Version]:
    """Returns up to `limit` of a model's versions, those before number `before`, newest first.

    Raises:
        NotFound: there is no model that the caller may see.
    """
    async with registry.database.reading() as session:
        model = await _get(session, caller, model_id)
        wanted = select(ModelVersion).where(ModelVersion.model_id == model.id).order_by(ModelVersion.number.desc())
        if before is not None:
            wanted = wanted.where(ModelVersion.number < before)
        return [version_of(model, version) for version in await session.scalars(wanted.limit(limit))]


async def rename(registry: Registry, caller: Caller, model_id: str, name: str) -> Model:
    """Gives a model another name.

    Raises:
        NotFound: there is none that the caller may see.
        Conflict: its user has one of that name already.
    """
    try:
        async with registry.database.transaction() as session:
            model = await _get(session, caller, model_id, held=True)
            model.name = name
            await session.flush()
            return (await described(session, [model]))[0]
    except IntegrityError as error:
        raise Conflict(f"there is a model {name} already", "Choose another name.") from error


async def publish(registry: Registry, caller: Caller, model_id: str, number: int) -> Model:
    """Has a version draw from now on: a newer one, or an older one again.

    Raises:
        NotFound: there is no such version that the caller may see.
        ConsentMissing: whoever it shows does not agree to it any more.
    """
    async with registry.database.transaction() as session:
        model = await _get(session, caller, model_id, held=True)
        version = await _numbered(session, model, number)
        await _require_consent(session, model)
        model.published_id, model.published_at = version.id, now()
        await audit.append(session, caller.name, "model.published", f"model:{model.id}", version=number)
        return (await described(session, [model]))[0]


@dataclass(frozen=True)
class Kept:
    """What a version is loaded from: a file of weights, or those of a whole model's folder, by their names in it."""

    files: dict[str, Path]
    sha256: str
    made: datetime

    @property
    def file(self) -> Path | None:
        """The only one; None for a folder."""
        return next(iter(self.files.values())) if len(self.files) == 1 else None


async def weights_of(registry: Registry, caller: Caller, model_id: str, number: int | None = None) -> Kept:
    """Returns what a version is loaded from, the published one if no number is given. Raises as `file_of` does."""
    version = await _agreed(registry, caller, model_id, number)
    files = {name: await _file(registry, version, name) for name in model_files(version.files)}
    return Kept(files, version.sha256, version.created_at)


async def file_of(registry: Registry, caller: Caller, model_id: str, number: int, name: str) -> tuple[Path, str]:
    """Returns a file of a version, and its SHA-256.

    Raises:
        NotFound: there is no such file that the caller may see, or no version is published.
        ConsentMissing: whoever it shows does not agree to it any more.
    """
    version = await _agreed(registry, caller, model_id, number)
    return await _file(registry, version, name), version.files[name]


async def _agreed(registry: Registry, caller: Caller, model_id: str, number: int | None) -> ModelVersion:
    """Returns a version that whoever it shows agrees to, the published one if no number is given."""
    async with registry.database.reading() as session:
        model = await _get(session, caller, model_id)
        await _require_consent(session, model)
        if number is not None:
            return await _numbered(session, model, number)
        published = await session.get(ModelVersion, model.published_id or "")
        if published is None:
            raise NotFound("no version of this model is published", "Name a version.")
        return published


async def _file(registry: Registry, version: ModelVersion, name: str) -> Path:
    path = registry.folder.file_of(version.id, name)
    if name not in version.files or not await anyio.to_thread.run_sync(path.is_file):
        raise NotFound("this file of the model is not there")
    return path


async def as_kohya(kept: Kept) -> bytes:
    """Returns a LoRA with kohya's keys. Raises InvalidRequest when it is none that has them."""
    file = kept.file
    if file is None:
        raise InvalidRequest("this model has no such form: it is a whole one", "Take it as it is.")

    def convert() -> bytes:
        quiet_libraries()
        from api.engine.kohya import to_kohya  # torch comes with it

        return to_kohya(file)

    try:
        return await anyio.to_thread.run_sync(convert)
    except ModelUnavailable as error:
        raise InvalidRequest(f"this model has no such form: {error.detail}", "Take it as it is.") from error


async def revoke(registry: Registry, caller: Caller, model_id: str) -> Model:
    """Takes the consent to a model back: nobody draws with it any more, and its files and photos are deleted.

    Raises:
        NotFound: there is none that the caller may see.
    """
    async with registry.database.transaction() as session:
        model = await _held(session, caller, model_id)
        gone = await _empty(session, caller, model, REVOKED)
        shown = (await described(session, [model]))[0]
    await forget(registry, gone)
    return shown


async def expire(registry: Registry) -> int:
    """Does what `revoke` does to each model whose last consent has ended by itself; returns how many those were."""
    unrevoked = exists().where(Consent.model_id == tables.Model.id, Consent.revoked_at.is_(None))
    over = select(tables.Model.id).where(unrevoked, ~consented())
    async with registry.database.reading() as session:
        found = list(await session.scalars(over))
    ended = 0
    for model_id in found:
        async with registry.database.transaction() as session:
            try:
                model = await _held(session, SWEEP, model_id)
            except NotFound:  # erased meanwhile
                continue
            if not await session.scalar(over.where(tables.Model.id == model_id)):  # agreed to anew
                continue
            gone = await _empty(session, SWEEP, model, EXPIRED)
        await forget(registry, gone)
        ended += 1
    return ended


async def erase(registry: Registry, caller: Caller, model_id: str) -> None:
    """Erases a model with its versions, files and photos; a line of the audit keeps the hashes of its weights.

    Raises as `revoke` does.
    """
    async with registry.database.transaction() as session:
        model = await _held(session, caller, model_id)
        gone = await _out_of_use(session, model)
        await session.delete(model)
        await _note(session, caller, model, ERASED, gone)
    await forget(registry, gone)


@dataclass(frozen=True)
class Gone:
    """What is out of use: versions, the hashes of their weights, trainings, and jobs that are to be told."""

    versions: list[str]
    sha256: list[str]
    trainings: list[str]
    told: Sequence[str] = ()


async def gone_with(session: AsyncSession, models: Collection[str]) -> Gone:
    """Returns what goes with these models."""
    columns = select(ModelVersion.id, ModelVersion.sha256).where(ModelVersion.model_id.in_(models))
    made = (await session.execute(columns.order_by(ModelVersion.id))).all()
    owners = select(tables.Model.user_id).where(tables.Model.id.in_(models))
    trained = select(Request.id, Request.parameters).where(Request.user_id.in_(owners), Request.kind == "train")
    trainings = [job_id for job_id, made in await session.execute(trained) if made["model"] in models]
    return Gone([version for version, _ in made], [sha256 for _, sha256 in made], trainings)


async def forget(registry: Registry, gone: Gone) -> None:
    """Removes from memory and disk what is out of use, and tells its jobs."""
    for topic in (*gone.told, BEAT):
        registry.wake.wake(topic)
    await anyio.to_thread.run_sync(registry.models.revoke, gone.versions)
    await anyio.to_thread.run_sync(_delete_files, registry.folder, gone)


def _delete_files(folder: ModelFolder, gone: Gone) -> None:
    for remove, names in ((folder.delete, gone.versions), (folder.end_training, gone.trainings)):
        for name in names:
            try:
                remove(name)
            except SitterError as error:
                log.warning("file_left_over", name=name, reason=error.detail)


async def _held(session: AsyncSession, caller: Caller, model_id: str) -> tables.Model:
    """Returns a model whose user is held, so that nobody trains it anew meanwhile. Raises NotFound."""
    user_id = (await _get(session, caller, model_id)).user_id
    await session.execute(select(User.id).where(User.id == user_id).with_for_update(key_share=True))
    session.expire_all()  # somebody else may have erased it before we held the user
    return await _get(session, caller, model_id)


async def _empty(session: AsyncSession, caller: Caller, model: tables.Model, why: str) -> Gone:
    """Ends a model's consents, jobs and versions; returns what goes."""
    gone = await _out_of_use(session, model)
    model.published_id = model.published_at = None
    await session.execute(delete(ModelVersion).where(ModelVersion.model_id == model.id))
    await _note(session, caller, model, why, gone)
    return gone


async def _note(session: AsyncSession, caller: Caller, model: tables.Model, why: str, gone: Gone) -> None:
    said = {"versions": gone.versions, "sha256": gone.sha256}
    await audit.append(session, caller.name, why, f"model:{model.id}", **said)


async def _out_of_use(session: AsyncSession, model: tables.Model) -> Gone:
    """Ends a model's consents and jobs; returns what goes with it."""
    gone = await gone_with(session, [model.id])
    active = select(Request.id, Request.versions).where(
        Request.user_id == model.user_id, Request.status.in_(["queued", "running"])
    )
    mine = [
        job_id
        for job_id, drawn in await session.execute(active)
        if job_id in gone.trainings or {version_id for version_id, _ in drawn or ()} & set(gone.versions)
    ]
    ended, asked = await jobs.cancel_some(session, model.user_id, mine)
    gone = await gone_with(session, [model.id])  # again: one may have added a version before it was held
    forgotten = update(Request).where(Request.id.in_(gone.trainings))
    await session.execute(forgotten.values(description="", training=None, body_hash=""))
    unrevoked = update(Consent).where(Consent.model_id == model.id, Consent.revoked_at.is_(None))
    await session.execute(unrevoked.values(revoked_at=now()))
    return Gone(gone.versions, gone.sha256, gone.trainings, [*ended, *asked])


async def _get(session: AsyncSession, caller: Caller, model_id: str, *, held: bool = False) -> tables.Model:
    model = await session.get(tables.Model, model_id, with_for_update=held)
    if model is None or not caller.may_see(model.user_id):
        raise NotFound("there is no such model")
    return model


async def _require_consent(session: AsyncSession, model: tables.Model) -> None:
    if not await session.scalar(select(consented()).where(tables.Model.id == model.id)):
        raise ConsentMissing(f"whoever {model.name} shows does not agree to it any more")


async def _numbered(session: AsyncSession, model: tables.Model, number: int) -> ModelVersion:
    wanted = select(ModelVersion).where(ModelVersion.model_id == model.id, ModelVersion.number == number)
    version = await session.scalar(wanted)
    if version is None:
        raise NotFound(f"this model has no version {number}")
    return version
