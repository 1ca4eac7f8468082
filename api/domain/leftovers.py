"""Trainings, models and uploads that belong to nothing any more: left by ends, crashes and erasures."""

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import anyio.to_thread
import structlog
from sqlalchemy import ColumnElement, delete, exists, select

from api.domain.history import ENDED
from api.domain.policy import in_force
from api.domain.registry import Registry, expire
from api.errors import SitterError
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import Consent, Model, ModelVersion, Request

log = structlog.get_logger()

SWEEP_SECONDS = 20.0  # photos shall not outlive their training by much
SELDOM = 180  # sweeps: what was erased is gone at once, as a rule
ORPHAN_SECONDS = 3600.0  # how old what no row knows must be before it is taken for left over
ROWS_AT_ONCE = 500


async def keep_swept(own: Registry) -> None:
    """Sweeps now and then, until it is cancelled."""
    trainings, versions = (partial(sweep, own.folder, own.database) for sweep in (sweep_trainings, sweep_versions))
    uploads = partial(sweep_uploads, own.folder)
    for number in itertools.count():
        for sweep, every in ((trainings, 1), (partial(expire, own), SELDOM), (versions, SELDOM), (uploads, SELDOM)):
            try:
                if number % every == 0 and (removed := await sweep()):
                    log.info("swept", folders=removed)
            except SitterError as error:
                log.warning(error.code, reason=error.detail)
        await asyncio.sleep(SWEEP_SECONDS)


async def sweep_trainings(folder: ModelFolder, database: Database, seconds: float = ORPHAN_SECONDS) -> int:
    """Removes what trainings needed that have ended, or that no row knows; returns how many folders those were.

    Photos stay where their owner wished so and still agrees to the model. Versions go with trainings that came to
    nothing, unless somebody has published them meanwhile.
    """
    removed = 0
    for some in _batches(await anyio.to_thread.run_sync(folder.trainings)):
        async with database.reading() as session:
            asked = select(Request.id, Request.status, Request.parameters).where(Request.id.in_(some))
            jobs = {job_id: (status, parameters) for job_id, status, parameters in await session.execute(asked)}
            consents = {parameters["consent"] for _, parameters in jobs.values() if parameters["keep_pictures"]}
            agreed = set(await session.scalars(select(Consent.id).where(Consent.id.in_(consents), in_force())))
        if failed := [job_id for job_id, (status, _) in jobs.items() if status in ENDED and status != "succeeded"]:
            await _drop_versions(folder, database, failed)
        for job_id, age in some.items():
            status, parameters = jobs.get(job_id, (None, {}))
            if status in ENDED or (status is None and age > seconds):
                keep = status == "succeeded" and parameters["keep_pictures"] and parameters["consent"] in agreed
                removed += await _removed(folder.end_training, job_id, keep)
    return removed


async def _drop_versions(folder: ModelFolder, database: Database, jobs: Collection[str]) -> None:
    """Removes what these trainings made and nobody has published: they were cancelled, or failed, just before."""
    async with database.transaction() as session:
        theirs = select(Model.published_id).join(ModelVersion, ModelVersion.model_id == Model.id)
        theirs = theirs.where(ModelVersion.request_id.in_(jobs)).order_by(Model.id)
        held = await session.scalars(theirs.with_for_update(of=Model))  # as whoever publishes one does
        published = {version_id for version_id in held if version_id is not None}
        dropped = delete(ModelVersion).where(ModelVersion.request_id.in_(jobs), ModelVersion.id.not_in(published))
        versions = list(await session.scalars(dropped.returning(ModelVersion.id)))
    for version_id in versions:
        await _removed(folder.delete, version_id)


async def sweep_versions(folder: ModelFolder, database: Database, seconds: float = ORPHAN_SECONDS) -> int:
    """Removes versions that no row knows, or to which nobody agrees any more; returns how many those were."""
    removed = 0
    for some in _batches(await anyio.to_thread.run_sync(folder.versions)):
        async with database.reading() as session:
            rows = select(ModelVersion.id, _agreed()).join(Model, Model.id == ModelVersion.model_id)
            known = {row[0]: row[1] for row in await session.execute(rows.where(ModelVersion.id.in_(some)))}
        for version_id, age in some.items():
            if not known.get(version_id, age <= seconds):
                removed += await _removed(folder.delete, version_id)
    return removed


async def sweep_uploads(folder: ModelFolder) -> int:
    """Removes uploads that have expired; returns how many those were."""
    return await anyio.to_thread.run_sync(folder.uploads.sweep)


async def _removed(remove: Callable[..., bool], *what: Any) -> bool:
    """Removes a folder; one that stays does not keep the others from going."""
    try:
        return await anyio.to_thread.run_sync(remove, *what)
    except SitterError as error:
        log.warning("file_left_over", name=what[0], reason=error.detail)
        return False


def _batches(ages: dict[str, float]) -> Iterator[dict[str, float]]:
    entries = iter(ages.items())
    while some := dict(itertools.islice(entries, ROWS_AT_ONCE)):
        yield some


def _agreed() -> ColumnElement[bool]:
    """Returns whether a row of `models` has a consent that was not taken back; it may have ended by itself."""
    return exists().where(Consent.model_id == Model.id, Consent.revoked_at.is_(None))
