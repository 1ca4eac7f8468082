"""Trainings: photos and a consent become a job, and the job a version of the user's own model."""

import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import structlog
from anyio import CapacityLimiter
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import ModelSource, Settings
from api.domain import audit, jobs, quota
from api.domain.faces import require_faces
from api.domain.generate import Studio
from api.domain.jobs import QUEUED, RUNNING, Claim, Progress
from api.domain.made import LEARNED, Made, make
from api.domain.models import next_number, open_model, own_models
from api.domain.photos import Chosen
from api.domain.policy import ConsentMissing, consented, granted
from api.errors import (
    Busy,
    Cancelled,
    DatabaseUnavailable,
    Forbidden,
    KeyReused,
    LimitReached,
    NotAuthenticated,
    NotFound,
    OutOfMemory,
    SitterError,
)
from api.store.database import Database
from api.store.models import ModelFolder, model_sha256
from api.store.tables import Model, ModelVersion, Queue, Request, Usage, User, new_id, now
from api.store.vault import Vault
from api.wire.models import Kind, TrainingRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from api.engine.dreambooth import Report

log = structlog.get_logger()

PREVIEW_SIDE = 256  # pixels
CURVE_POINTS = 100  # of the loss that are kept
Tell = Callable[[Progress], None]
Check = Callable[[], None]
Beat = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class TrainingOrder:
    """A training as it was asked for: whose, of what, and with whose consent."""

    user_id: str
    name: str
    class_noun: str
    chosen: Chosen
    source: ModelSource  # of the base
    granted_by: str
    consent_days: int | None = None
    kind: Kind = "lora"
    steps: int | None = None
    rank: int | None = None
    seed: int = 0
    flip: bool = False
    resolution: int | None = None
    train_text_encoder: bool = False
    prior_preservation: bool = True
    keep_pictures: bool = False
    webhook_url: str | None = None
    idempotency_key: str | None = None

    @classmethod
    def of(
        cls,
        asked: TrainingRequest,
        user_id: str,
        chosen: Chosen,
        source: ModelSource,
        granted_by: str,
        idempotency_key: str | None = None,
    ) -> "TrainingOrder":
        """Returns the order for what was asked for, from photos that were chosen, over that base."""
        rest = asked.model_dump(exclude={"name", "class_noun", "consent", "user_id", "base"})
        given = (user_id, asked.name, asked.class_noun, chosen, source, granted_by)
        return cls(*given, idempotency_key=idempotency_key, **rest)

    def parameters(self) -> dict[str, Any]:
        """Returns what the job has to know."""
        asked = {name: getattr(self, name) for name in ("class_noun", "keep_pictures", *LEARNED)}
        return {**asked, "source": self.source.model_dump(exclude_defaults=True)}


async def submit(
    settings: Settings, database: Database, vault: Vault, folder: ModelFolder, order: TrainingOrder
) -> Request:
    """Keeps the photos and writes the job, its model where that is new, and the consent.

    Once this returns, the model will be trained, whatever happens to the server.

    Raises:
        Forbidden: whole models are not trained here.
        KeyReused: that Idempotency-Key came with another training.
        LimitReached: a limit of the user is used up.
        Busy: the whole queue is full.
        NotFound: there is no such user.
        NotAuthenticated: the user is disabled.
        InvalidRequest: the model of that name shows something else than that class.
        StorageFull, StorageUnavailable, DatabaseUnavailable: nothing was accepted.
    """
    if order.kind == "full" and not settings.full_training:
        raise Forbidden("whole models are not trained here", "Train a LoRA, or have the operator set FULL_TRAINING.")
    job_id = new_id()
    photos = ((photo.file.name, photo.file.read_bytes()) for photo in order.chosen.photos)  # read one by one
    try:
        await anyio.to_thread.run_sync(folder.keep_photos, job_id, photos)
        async with database.transaction() as session:
            job = await _accept(session, settings, vault, order, job_id)
    except DatabaseUnavailable:
        raise  # it may be written all the same; what is not is swept
    except SitterError:
        await anyio.to_thread.run_sync(folder.end_training, job_id)
        raise
    if job.id != job_id:  # its key made it before
        await anyio.to_thread.run_sync(folder.end_training, job_id)
    return job


async def _accept(
    session: AsyncSession, settings: Settings, vault: Vault, order: TrainingOrder, job_id: str
) -> Request:
    if settings.auth == "open":
        await quota.ensure_users(session, [order.user_id])
    user = await session.get(User, order.user_id, with_for_update=True)
    if user is None:
        raise NotFound(f"there is no user {order.user_id}")
    photos = [photo.sha256 for photo in order.chosen.photos]
    verdicts = [{"name": name, "good": reason is None, "reason": reason} for name, reason in order.chosen.verdicts]
    body = repr((order.name, order.parameters(), photos, order.webhook_url)).encode()
    if order.idempotency_key is not None:
        same = select(Request).where(Request.user_id == user.id, Request.idempotency_key == order.idempotency_key)
        if known := await session.scalar(same):
            if not vault.matches(known.body_hash, body):
                raise KeyReused("this Idempotency-Key was used for another request")
            return known
    if user.disabled:
        raise NotAuthenticated("this user is disabled")
    queued = await session.scalar(select(func.count()).where(QUEUED)) or 0
    if queued >= settings.max_queued:
        raise Busy(f"{queued} jobs are waiting already")
    used = await quota.used(session, [user.id])
    quota.check(user, used[user.id], settings, images=0, steps=0)
    await _require_place(session, settings, user.id)
    quota.require_space(settings, await quota.kept_bytes(session, user.id))
    model = await open_model(session, user.id, order.name, order.class_noun)
    consent = granted(model, order.granted_by, order.consent_days, photos)
    session.add(consent)
    await session.flush()
    job = Request(
        id=job_id,
        user_id=user.id,
        kind="train",
        description=f"{model.name}: {model.token}",
        parameters=order.parameters() | {"model": model.id, "consent": consent.id},
        training={"pictures": verdicts},
        model_id=f"{user.id}/{model.name}",
        webhook_url=order.webhook_url,
        idempotency_key=order.idempotency_key,
        body_hash=vault.digest(body),
        images=0,
        steps=0,
        work=0,  # it has a share of the device of its own, and costs nobody's turn
        start_tag=max(await session.scalar(select(Queue.virtual_time)) or 0, user.finish_tag),
    )
    session.add(job)
    await session.flush()
    said = {"statement": consent.statement, "evidence": consent.evidence}
    await audit.append(session, order.granted_by, "consent.granted", f"model:{model.id}", **said)
    return job


async def _require_place(session: AsyncSession, settings: Settings, user_id: str) -> None:
    """Raises LimitReached when the user has as many trainings under way as one may have: each takes minutes."""
    active = Request.status.in_(["queued", "running"])
    under_way = select(func.count()).where(Request.user_id == user_id, active, Request.kind == "train")
    most = settings.limit_trainings
    if most and (await session.scalar(under_way) or 0) >= most:
        raise LimitReached(f"{most} trainings of yours wait or run, and no more may", "Send it again once one is done.")


async def learn(studio: Studio, claim: Claim, tell: Tell, beat: Beat, check: Check, threads: CapacityLimiter) -> None:
    """Trains, and writes the version that comes of it; begun again it goes on from where it was.

    Args:
        studio: what training needs.
        claim: the job.
        tell: is told how far it is.
        beat: writes that down at once.
        check: called now and then.
        threads: where it computes.

    Raises:
        ConsentMissing: nobody agrees to it any more.
        SitterError: nothing was learned; or whatever `tell` or `check` raised.
    """
    told = _Told(tell, dict(claim.job.training or {}))
    told.phase("checking")
    await beat()
    version = await _version_of(studio.database, claim.job)
    if version is None:
        await require_faces(studio, claim.job, lambda found: told.know(pictures=found), beat, check, threads)
        made = await anyio.to_thread.run_sync(make, studio, claim.job, told.report, check, limiter=threads)
        told.phase("publishing")
        await beat()
        version = await _add_version(studio, claim, made)
    told.know(version=version.number, scores=version.scores, refusal=version.refusal)
    await beat()
    if version.refusal is None:
        told.phase("warming")
        await beat()
        ((own, _),) = await own_models(studio.database, studio.folder, claim.job.user_id, [(version.id, 1.0)])
        try:
            await anyio.to_thread.run_sync(studio.models.warm_up, own, limiter=threads)
        except OutOfMemory as error:  # it loads when it is asked for
            log.warning(error.code, reason=error.detail)


async def publish(database: Database, claim: Claim) -> bool:
    """Ends a training; from now on its version draws, unless it was found wanting.

    Returns False, having changed nothing, when the job is no longer this claim's.

    Raises:
        ConsentMissing: nobody agrees to it any more.
    """
    job = claim.job
    async with database.transaction() as session:
        version = await session.scalar(select(ModelVersion).where(ModelVersion.request_id == job.id))
        if version is None:
            return False
        ended = await jobs.end(
            session,
            claim,
            status="succeeded",
            model_id=f"{job.model_id}@{version.number}",
            warnings=[version.refusal] if version.refusal else [],
            step=Request.step_count,
        )
        if not ended:
            return False
        model = await _model_of(session, job)
        if version.refusal is None:
            model.published_id, model.published_at = version.id, now()
        seconds = version.parameters["seconds"]
        session.add(Usage(request_id=job.id, user_id=job.user_id, images=0, steps=0, work=0, seconds=seconds))
    return True


async def _version_of(database: Database, job: Request) -> ModelVersion | None:
    """Returns the version that an earlier attempt made. Raises ConsentMissing when nobody agrees to it any more."""
    async with database.reading() as session:
        await _model_of(session, job)
        return await session.scalar(select(ModelVersion).where(ModelVersion.request_id == job.id))


async def _model_of(session: AsyncSession, job: Request) -> Model:
    """Returns the model that a training is for, held. Raises ConsentMissing when nobody agrees to it any more."""
    asked = job.parameters
    agreed = select(Model).where(Model.user_id == job.user_id, Model.id == asked["model"], consented(asked["consent"]))
    model = await session.scalar(agreed.with_for_update())
    if model is None:
        raise ConsentMissing("whoever is in the pictures does not agree to it any more")
    return model


async def _add_version(studio: Studio, claim: Claim, made: Made) -> ModelVersion:
    """Keeps what was made; nothing draws with it yet. Raises Cancelled when somebody else has the job."""
    version_id, job = new_id(), claim.job
    await anyio.to_thread.run_sync(studio.folder.keep, version_id, made.files)
    try:
        async with studio.database.transaction() as session:
            ours = select(Request.id).where(Request.id == job.id, RUNNING, Request.token == claim.token)
            if await session.scalar(ours.with_for_update()) is None:
                raise Cancelled("somebody else has this job now")
            model = await _model_of(session, job)
            version = ModelVersion(
                id=version_id,
                model_id=model.id,
                number=next_number(model),
                kind=job.parameters.get("kind", "lora"),
                source=job.parameters["source"],
                base_hash=made.base_hash,
                sha256=model_sha256(made.hashes),
                files=made.hashes,
                bytes=made.bytes,
                parameters=made.parameters,
                scores=made.scores,
                refusal=made.refusal,
                request_id=job.id,
            )
            session.add(version)
    except DatabaseUnavailable:
        raise  # as above
    except SitterError:
        await anyio.to_thread.run_sync(studio.folder.delete, version_id)
        raise
    return version


class _Told:
    """Tells how far a training is, and what is known of it so far.

    Args:
        send: where it is told.
        training: what is known already.
    """

    def __init__(self, send: Tell, training: dict[str, Any]) -> None:
        self._send = send
        self._training = training
        self._now = Progress("checking")

    def phase(self, name: str) -> None:
        """Says that it has come to another phase."""
        self._now = Progress(name, self._now.step, self._now.step_count)
        self._send(self._now)

    def know(self, **values: Any) -> None:
        """Says what is known of it besides."""
        self._training = {**self._training, **values}
        self._send(replace(self._now, training=self._training))

    def report(self, report: "Report") -> None:
        """Says what the engine does."""
        preview = None if report.sample is None else _jpeg(report.sample)
        self._now = Progress(report.phase, report.done, report.of)
        training = self._losses(report.done, report.of, report.loss) if report.phase == "training" else None
        self._send(replace(self._now, preview=preview, preview_step=report.done, training=training))

    def _losses(self, done: int, of: int, loss: float | None) -> dict[str, Any] | None:
        if loss is None or done % max(1, of // CURVE_POINTS):
            return None
        # Begun again from its last state, it comes by the same steps again.
        before = [point for point in self._training.get("losses", []) if point[0] < done]
        self._training = {**self._training, "losses": [*before, [done, round(loss, 4)]]}
        return self._training


def _jpeg(image: "Image") -> bytes:
    buffer, small = io.BytesIO(), image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
