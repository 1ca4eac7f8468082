"""POST /generate and /generate/image: a job like every other, and the wait for its pictures."""

import asyncio
import base64
import re
import time
from dataclasses import dataclass
from typing import Annotated, Any, cast
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse

from api.domain import history
from api.domain.accounts import Caller, Credentials, identify
from api.domain.history import ENDED, Seen
from api.errors import Cancelled, DatabaseUnavailable, InvalidRequest, NotFound, ShuttingDown, from_code
from api.routes.caller import CallerDep, CredentialsDep, require
from api.routes.errors import error_responses
from api.routes.jobs import REAUTH_SECONDS, JobBody, accept, describe
from api.routes.repeat import IdempotencyKey
from api.routes.service import ServiceDep
from api.schemas import GeneratedImage, GenerateResponse, Lane, Timings
from api.wire.jobs import Job
from api.wiring import Service

router = APIRouter(tags=["Pictures"], dependencies=[Depends(require("draw"))])

ERRORS: dict[int | str, dict[str, Any]] = {
    **error_responses(400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504, 507),
    202: {"model": Job, "description": "Accepted, with `Prefer: respond-async`: look at /jobs/{id}."},
}
Prefer = Annotated[
    str | None,
    Header(description="`respond-async` answers 202 with the job at once; `wait=20` after 20 seconds at the latest."),
]


@dataclass(frozen=True)
class _Client:
    """Who waits for a picture, since when and for how many seconds at most."""

    http: Request
    service: Service
    caller: Caller
    sent: Credentials
    patience: float
    began: float


async def _client(
    http: Request, service: ServiceDep, caller: CallerDep, sent: CredentialsDep, prefer: Prefer = None
) -> _Client:
    return _Client(http, service, caller, sent, _patience(prefer), time.perf_counter())


ClientDep = Annotated[_Client, Depends(_client)]


@dataclass(frozen=True)
class _Finished:
    """A job that succeeded, its PNGs, and the seconds since it was asked for."""

    seen: Seen
    pngs: list[bytes]
    seconds: float


@router.post("/generate", summary="Draw a picture: JSON", response_model=GenerateResponse, responses=ERRORS)
async def generate_json(request: JobBody, client: ClientDep, idempotency_key: IdempotencyKey = None) -> Any:
    """Draws a picture with the user's own model; answers with the PNG in base64 and where it is kept.

    The picture is drawn even when you do not wait for the answer: find it under /jobs and /images.
    """
    done = await _wait(client, await accept(request, client.service, client.caller, idempotency_key))
    return _describe(done, client.service) if isinstance(done, _Finished) else done


@router.post(
    "/generate/image",
    summary="Draw a picture: PNG",
    response_class=Response,
    responses={
        **ERRORS,
        200: {
            "description": "The picture.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            "headers": {
                "X-Model-Used": {"description": "The model that drew it.", "schema": {"type": "string"}},
                "X-Generation-Time": {"description": "Seconds it took.", "schema": {"type": "number"}},
                "X-Seed": {"description": "The seed that draws it again.", "schema": {"type": "integer"}},
                "X-Job-Id": {"description": "Its job.", "schema": {"type": "string"}},
                "X-Warning": {
                    "description": "Only where a prompt was cut or the model cannot do all that was asked; see its job",
                    "schema": {"type": "string"},
                },
            },
        },
    },
)
async def generate_png(request: JobBody, client: ClientDep, idempotency_key: IdempotencyKey = None) -> Response:
    """Draws a picture as `/generate` does; answers with the PNG itself."""
    if request.num_images != 1:
        raise InvalidRequest("/generate/image answers with one picture", "Leave num_images at 1, or use /generate.")
    done = await _wait(client, await accept(request, client.service, client.caller, idempotency_key))
    if isinstance(done, Response):
        return done
    headers = {
        "X-Model-Used": quote(done.seen.job.model_id, safe="/:@ "),  # a header is Latin-1, a path may be anything
        "X-Generation-Time": f"{done.seconds:.3f}",
        "X-Seed": str(done.seen.images[0].seed),
        "X-Job-Id": done.seen.job.id,
    }
    if done.seen.job.warnings:
        why = "a prompt was too long to be read whole, or the model cannot do all that was asked"
        headers["X-Warning"] = f"{why}: GET /jobs/{done.seen.job.id} says more"
    return Response(done.pngs[0], media_type="image/png", headers=headers)


async def _wait(client: _Client, seen: Seen) -> _Finished | Response:
    """Returns the finished job; the answer 202 where the client prefers not to wait so long.

    Raises:
        SitterError: the job failed or was cancelled, has to wait for room on the disk, or the server stops.
    """
    service, caller, authenticated = client.service, client.caller, time.monotonic()
    try:
        while seen.job.status not in ENDED:
            if seen.job.status == "queued" and seen.job.error_code is not None:
                raise _failure(seen)  # it waits for room on the disk, which may take long
            await service.pictures.require_room()
            if service.worker.draining and seen.job.status == "queued":
                raise ShuttingDown("the server is stopping", "The job is kept: it runs when the server is back.")
            if time.perf_counter() - client.began >= client.patience or await client.http.is_disconnected():
                location = {"Location": f"/jobs/{seen.job.id}", "Preference-Applied": "respond-async"}
                return JSONResponse(describe(seen, service, caller).model_dump(mode="json"), 202, location)
            seen = await history.changed(service.wake, service.database, caller, seen)
            if time.monotonic() - authenticated >= REAUTH_SECONDS:
                caller, authenticated = await identify(service.accounts, client.sent), time.monotonic()
        await identify(service.accounts, client.sent)  # who may see the picture is settled when there is one
    except DatabaseUnavailable as error:
        kept = f"The job is kept: look at /jobs/{seen.job.id} once the database is back."
        raise DatabaseUnavailable(error.detail, kept) from error
    except asyncio.CancelledError as error:  # by uvicorn, whose patience with what still runs is at its end
        raise ShuttingDown("the server is stopping", "The job is kept: it runs when the server is back.") from error
    if seen.job.status != "succeeded":
        raise _failure(seen)
    pngs = await anyio.to_thread.run_sync(_read, service, seen)
    return _Finished(seen, pngs, time.perf_counter() - client.began)


def _patience(prefer: str | None) -> float:
    """Returns the seconds that a Prefer header (RFC 7240) is ready to wait."""
    if prefer is None:
        return float("inf")
    if named := re.search(r"\bwait=(\d{1,6})\b", prefer):
        return float(named[1])
    return 0.0 if re.search(r"\brespond-async\b", prefer) else float("inf")


def _failure(seen: Seen) -> Exception:
    job = seen.job
    if job.status == "cancelled":
        return Cancelled("the job was cancelled")
    return from_code(job.error_code or "", job.error_detail or "", job.error_hint or "")


def _read(service: Service, seen: Seen) -> list[bytes]:
    if not seen.images:
        raise NotFound("the pictures of this job were deleted")
    return [service.pictures.read(image.image_url) for image in seen.images]


def _describe(done: _Finished, service: Service) -> GenerateResponse:
    job = done.seen.job
    images = [
        GeneratedImage(
            image_id=image.id,
            image_base64=base64.b64encode(png).decode(),
            image_path=str(service.pictures.path_of(image.image_url)),
            seed=image.seed,
        )
        for image, png in zip(done.seen.images, done.pngs, strict=True)
    ]
    return GenerateResponse(
        success=True,
        message="Image generated successfully",
        **images[0].model_dump(),
        warnings=job.warnings,
        job_id=job.id,
        model_id=job.model_id,
        generation_time=round(done.seconds, 3),
        cache="hit" if job.cache_hit else "miss",
        lane=cast(Lane, job.lane or "stock"),  # as it was with every worker that did not say
        timings=Timings.model_validate(job.timings),
        images=images,
    )
