"""Jobs: make one, look at it, follow it live, cancel it."""

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import APIRouter, Body, Depends, Header, Path, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.config import UserId
from api.domain import history, jobs
from api.domain.accounts import Caller, Credentials, identify
from api.domain.history import ENDED, Seen
from api.domain.library import readable
from api.domain.submit import Order
from api.domain.webhooks import check_webhook_url
from api.domain.worker import BEAT
from api.errors import DatabaseUnavailable, Forbidden, SitterError
from api.routes.caller import CallerDep, CredentialsDep, require
from api.routes.errors import error_responses
from api.routes.repeat import IdempotencyKey
from api.routes.service import ServiceDep
from api.schemas import ErrorResponse
from api.wire.accounts import Id
from api.wire.jobs import Job, JobImage, JobPage, JobRequest, Status
from api.wiring import Service

log = structlog.get_logger()
router = APIRouter(prefix="/jobs", tags=["Jobs"])

T = TypeVar("T")

REAUTH_SECONDS = 30.0  # how long whoever follows a job may do so by a credential that has ended

JobBody = Annotated[
    JobRequest,
    Body(
        openapi_examples={
            "ada": {
                "summary": "Ada as an astronaut, from her own model",
                "value": {"prompt": "photo of sks person as a futuristic astronaut", "user_id": "ada", "seed": 42},
            }
        }
    ),
]


async def accept(request: JobRequest, service: Service, caller: CallerDep, idempotency_key: str | None) -> Seen:
    """Accepts a request for whoever it may be made for; returns its job.

    Raises:
        Forbidden: the caller may not ask for this.
        StorageFull: there is no room for its pictures.
        SitterError: see `Desk.submit`.
    """
    if request.priority > 0 and not caller.is_admin:
        raise Forbidden("a priority above 0 is for administrators", "Leave priority away.")
    if request.webhook_url is not None:
        check_webhook_url(request.webhook_url, service.settings)
    await service.pictures.require_room()
    named = request.user_id if "user_id" in request.model_fields_set else None
    order = Order(
        request.drawing(),
        caller.acts_for(named),
        sensitive=request.sensitive,
        tags=tuple(request.tags),
        category=request.category,
        priority=request.priority,
        webhook_url=request.webhook_url,
        idempotency_key=idempotency_key,
        deadline_seconds=request.deadline_seconds,
    )
    job = await service.desk.submit(order)
    structlog.contextvars.bind_contextvars(job=job.id)  # the line about the request tells it
    try:
        return await history.look(service.database, job)
    except DatabaseUnavailable:
        if job.status != "queued":  # the key's first request has gone on since
            raise
        return Seen(job, [], None, None)  # it is accepted: whoever is told otherwise sends it again


JobId = Annotated[Id, Path(description="Names the job.", examples=["019a9f3c2d10b1946ac93f21d07e"])]


async def _seen(job_id: JobId, service: ServiceDep, caller: CallerDep) -> Seen:
    return await history.find(service.database, caller, job_id)


SeenDep = Annotated[Seen, Depends(_seen)]


@router.post(
    "",
    status_code=202,
    summary="Draw a picture, without waiting for it",
    responses=error_responses(400, 401, 403, 404, 413, 422, 429, 503, 507),
    dependencies=[Depends(require("draw"))],
)
async def make_job(
    request: JobBody,
    service: ServiceDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Accepts a job: once this answers, the picture will be drawn, whatever happens to the server."""
    seen = await accept(request, service, caller, idempotency_key)
    response.headers["Location"] = f"/jobs/{seen.job.id}"
    return describe(seen, service, caller)


@router.get(
    "",
    summary="List jobs",
    responses=error_responses(401, 403, 422),
    dependencies=[Depends(require("read"))],
)
async def list_jobs(
    service: ServiceDep,
    caller: CallerDep,
    status: Annotated[Status | None, Query(description="Those in this state alone.")] = None,
    user_id: Annotated[UserId | None, Query(description="Whose; for administrators.")] = None,
    before: Annotated[Id | None, Query(description="Older than this job.")] = None,
    limit: Annotated[int, Query(description="Most jobs on a page.", ge=1, le=100)] = 20,
) -> JobPage:
    """Lists your jobs, newest first, a page at a time."""
    found = await history.page(service.database, caller, user_id, status, before, limit)
    return JobPage(
        jobs=[describe(seen, service, caller) for seen in found],
        before=found[-1].job.id if len(found) == limit else None,
    )


@router.get(
    "/{job_id}",
    summary="Look at a job",
    responses=error_responses(401, 403, 404),
    dependencies=[Depends(require("read"))],
)
async def show_job(seen: SeenDep, service: ServiceDep, caller: CallerDep) -> Job:
    """Says how far a job is, and where its pictures are."""
    return describe(seen, service, caller)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses=error_responses(401, 403, 404, 503),
    dependencies=[Depends(require("draw"))],
)
async def cancel_job(seen: SeenDep, service: ServiceDep, caller: CallerDep) -> Job:
    """Cancels a job: at once while it waits, within a step while it is drawn. An ended job stays as it is."""
    if await jobs.cancel(service.database, seen.job.id):
        service.metrics.job_ended("cancelled")
    service.wake.wake(seen.job.id)
    service.wake.wake(BEAT)
    return describe(await history.find(service.database, caller, seen.job.id), service, caller)


class Events(EventSourceResponse):
    """Server-sent events. FastAPI sends them as such by itself, and would document errors with a type set here."""

    media_type = ""


@asynccontextmanager
async def streamed(events: AsyncGenerator[T]) -> AsyncIterator[AsyncGenerator[T]]:
    """Closes what a stream sends at its end, which an error of ours is, too."""
    try:
        async with aclosing(events):
            yield events
    except SitterError as error:  # who comes back is told by the status of that answer
        log.info("stream_ended", code=error.code)


LastEventId = Annotated[int | None, Header(description="Go on after this event.", ge=0)]


async def _stop_coming_back(seen: SeenDep, response: Response, last_event_id: LastEventId = None) -> None:
    """Answers 204 to whom the end was told already: an EventSource comes back for ever after any other answer."""
    if seen.job.status in ENDED and seen.job.revision == last_event_id:
        response.status_code = 204


async def _counted(_: SeenDep, service: ServiceDep, caller: CallerDep) -> AsyncIterator[None]:
    """Counts the stream until it has ended. A dependency: what it raises is the answer, not an end of the stream."""
    with service.accounts.streams.one(caller.name):
        yield


@router.get(
    "/{job_id}/events",
    summary="Follow a job live",
    response_class=Events,
    responses={
        204: {"description": "It has ended, as your `Last-Event-ID` says."},
        **error_responses(401, 403, 404, 429),
    },
    dependencies=[Depends(require("read")), Depends(_counted), Depends(_stop_coming_back)],
)
async def follow_job(
    seen: SeenDep, service: ServiceDep, caller: CallerDep, sent: CredentialsDep, last_event_id: LastEventId = None
) -> AsyncIterator[ServerSentEvent]:
    """Sends `queued`, `loading`, `step`, `preview`, and at the end `done`, `failed` or `cancelled`.

    Of a training: `queued`, `checking`, `caching`, `step`, `sample`, `validating`, `publishing`, `warming`, the end.
    Every event's data is the job; that of a preview or sample is `{"step", "jpeg"}`, a small picture in base64.
    """
    async with streamed(_events(seen, service, caller, sent, last_event_id)) as events:
        async for event in events:
            yield event


async def _events(
    seen: Seen, service: Service, caller: Caller, sent: Credentials, told: int | None
) -> AsyncGenerator[ServerSentEvent]:
    """Yields events from the revision after `told` on.

    Raises:
        NotAuthenticated: the credential is not valid any more.
        NotFound: the job is gone, or no more to be seen by the caller.
        DatabaseUnavailable: nobody knows.
    """
    place, shown, authenticated = None, (0, 0), time.monotonic()
    while True:
        job = seen.job
        if job.revision != told or seen.position != place:
            yield ServerSentEvent(event=_event(seen), data=describe(seen, service, caller), id=str(job.revision))
            told, place = job.revision, seen.position
        if job.status in ENDED or service.worker.draining:
            return  # who follows a job of a server that stops comes back with Last-Event-ID
        preview = (job.attempt, job.preview_step)
        if job.status == "running" and job.preview_step and preview != shown:
            shown = preview
            if jpeg := await history.preview(service.database, job.id):
                data = {"step": job.preview_step, "jpeg": base64.b64encode(jpeg).decode()}
                event = "preview" if job.kind == "draw" else "sample"
                yield ServerSentEvent(event=event, data=data, id=str(job.revision))
        seen = await history.changed(service.wake, service.database, caller, seen)
        if time.monotonic() - authenticated >= REAUTH_SECONDS:
            caller, authenticated = await identify(service.accounts, sent), time.monotonic()


def _event(seen: Seen) -> str:
    match seen.job.status:
        case "succeeded":
            return "done"
        case "running":
            phase = seen.job.phase or "loading"
            return "step" if phase in ("drawing", "training") else phase
        case status:
            return status


def describe(seen: Seen, service: Service, caller: Caller) -> Job:
    """Returns the job as the wire shows it."""
    job = seen.job
    error = None
    if job.error_code is not None:
        error = ErrorResponse(error=job.error_code, detail=job.error_detail or "", hint=job.error_hint or "")
    known: dict[str, Any] = {name: getattr(job, name) for name in Job.model_fields if hasattr(job, name)}
    return Job.model_validate(
        known
        | {
            "prompt": readable(service.vault, caller, job.user_id, job.sensitive, job.description),
            "num_images": job.images,
            "steps": job.step_count,
            "position": seen.position,
            "eta_seconds": seen.eta_seconds,
            "images": [JobImage(id=image.id, url=f"/images/{image.id}/file", seed=image.seed) for image in seen.images],
            "error": error,
        }
    )
