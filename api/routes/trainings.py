"""POST /trainings: pictures and a consent become a job that makes a model."""

from collections.abc import Iterator
from typing import Annotated, Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import FormData

from api.domain import history, photos, trainings
from api.domain.accounts import Caller
from api.domain.history import Seen
from api.domain.models import base_named
from api.domain.photos import MOST_BYTES, MOST_FILES
from api.domain.policy import STATEMENT, STATEMENTS
from api.domain.trainings import TrainingOrder
from api.domain.wake import Wake
from api.domain.webhooks import check_webhook_url
from api.errors import InvalidRequest
from api.routes import forms
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.jobs import describe
from api.routes.repeat import IdempotencyKey
from api.routes.service import ServiceDep
from api.wire.jobs import Job
from api.wire.models import Statement, TrainingRequest
from api.wiring import Service

router = APIRouter(prefix="/trainings", tags=["Models"])

PICTURES, ARCHIVE = "pictures", "archive"
one_at_a_time = CapacityLimiter(1)  # a photo is up to 52 MB while it is looked at


PHOTOS: dict[str, Any] = {
    PICTURES: {"type": "array", "items": forms.FILE, "description": "3 to 20 pictures: JPEG, PNG or WebP."},
    ARCHIVE: {**forms.FILE, "description": "A ZIP of them instead."},
}


@router.post(
    "",
    status_code=202,
    summary="Train a model of somebody from a few pictures",
    responses=error_responses(400, 401, 403, 404, 408, 413, 422, 429, 503, 507),
    dependencies=[Depends(require("manage")), Depends(forms.one_body)],
    openapi_extra=forms.document(TrainingRequest, **PHOTOS),
)
async def make_training(
    http: Request, service: ServiceDep, caller: CallerDep, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    """Accepts a training: a job that is followed as every other, and ends with a version that draws."""
    async with forms.opened(http, MOST_FILES) as form:
        request = forms.read(form, TrainingRequest, PICTURES, ARCHIVE)
        seen = await accept(request, form, service, caller, idempotency_key)
    response.headers["Location"] = f"/jobs/{seen.job.id}"
    return describe(seen, service, caller)


async def accept(
    request: TrainingRequest, form: FormData, service: Service, caller: Caller, idempotency_key: str | None
) -> Seen:
    """Accepts a training, with the pictures of a form, for whoever it may be made for; returns its job.

    Raises:
        Forbidden: the caller may not ask for this.
        InvalidRequest: too few pictures are good.
        SitterError: see `trainings.submit`.
    """
    user_id = caller.acts_for(request.user_id)
    if request.webhook_url is not None:
        check_webhook_url(request.webhook_url, service.settings)
    await service.pictures.require_room()
    base = base_named(service.settings, request.base, user_id)
    with service.folder.collecting() as place:
        chosen = await anyio.to_thread.run_sync(photos.choose, _files(form), place, limiter=one_at_a_time)
        chosen.require_enough()
        order = TrainingOrder.of(request, user_id, chosen, base, caller.name, idempotency_key)
        job = await trainings.submit(service.settings, service.database, service.vault, service.folder, order)
    service.wake.wake(Wake.QUEUE)
    return await history.look(service.database, job)


@router.get("/consent", summary="What is agreed to when a model is trained", responses=error_responses(401, 403))
async def show_statement(_: Annotated[None, Depends(require("read"))]) -> Statement:
    """Returns the words that `consent` in POST /trainings stands for."""
    return Statement(version=STATEMENT, text=STATEMENTS[STATEMENT])


def _files(form: FormData) -> Iterator[tuple[str, bytes]]:
    """Yields the pictures that were sent, one after the other.

    Raises:
        InvalidRequest: there are none, or an archive besides.
    """
    sent, archives = forms.uploads(form, PICTURES), forms.uploads(form, ARCHIVE)
    if len(archives) + bool(sent) != 1:
        raise InvalidRequest("send pictures or one archive", "Repeat the field `pictures`, or send a ZIP as `archive`.")
    for archive in archives:
        yield from photos.in_archive(archive.file)
    for upload in sent:
        yield upload.filename or "", upload.file.read(MOST_BYTES + 1)
