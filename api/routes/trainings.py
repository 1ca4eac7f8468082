"""POST /trainings: pictures and a consent become a job that makes a model."""

from collections.abc import Iterator
from typing import Annotated, Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from api.config import DEFAULT_USER, ModelSource, Settings
from api.domain import history, photos, trainings
from api.domain.photos import MOST_BYTES, MOST_FILES, Chosen
from api.domain.policy import STATEMENT, STATEMENTS
from api.domain.trainings import TrainingOrder
from api.domain.wake import Wake
from api.domain.webhooks import check_webhook_url
from api.errors import InvalidRequest
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.jobs import describe
from api.routes.repeat import IdempotencyKey
from api.routes.service import ServiceDep
from api.wire.jobs import Job
from api.wire.models import Statement, TrainingRequest

router = APIRouter(prefix="/trainings", tags=["Models"])

PICTURES, ARCHIVE = "pictures", "archive"
_one_at_a_time = CapacityLimiter(1)  # a photo is up to 52 MB while it is looked at


def _form() -> dict[str, Any]:
    """Returns what OpenAPI says of the form: it is read by hand, once it is known who sends it."""
    schema = TrainingRequest.model_json_schema()
    binary = {"type": "string", "format": "binary"}
    schema["properties"] |= {
        PICTURES: {"type": "array", "items": binary, "description": "3 to 20 pictures: JPEG, PNG or WebP."},
        ARCHIVE: {**binary, "description": "A ZIP of them instead."},
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "",
    status_code=202,
    summary="Train a model of somebody from a few pictures",
    responses=error_responses(400, 401, 403, 404, 408, 413, 422, 429, 503, 507),
    dependencies=[Depends(require("manage"))],
    openapi_extra=_form(),
)
async def make_training(
    http: Request, service: ServiceDep, caller: CallerDep, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    """Accepts a training: a job that is followed as every other, and ends with a version that draws."""
    async with http.form(max_files=MOST_FILES, max_fields=32, max_part_size=10_000) as form:
        request = _request(form)
        user_id = caller.acts_for(request.user_id)
        if request.webhook_url is not None:
            check_webhook_url(request.webhook_url, service.settings)
        await service.pictures.require_room()
        chosen = await anyio.to_thread.run_sync(photos.choose, _files(form), limiter=_one_at_a_time)
    chosen.require_enough()
    order = TrainingOrder(
        user_id,
        request.name,
        request.class_noun,
        chosen.photos,
        _verdicts(chosen),
        _base(service.settings, request.base),
        caller.name,
        idempotency_key=idempotency_key,
        **request.model_dump(include={"steps", "rank", "seed", "flip", "keep_pictures", "webhook_url"}),
    )
    job = await trainings.submit(service.settings, service.database, service.vault, service.folder, order)
    service.wake.wake(Wake.QUEUE)
    response.headers["Location"] = f"/jobs/{job.id}"
    return describe(await history.look(service.database, job), service, caller)


@router.get("/consent", summary="What is agreed to when a model is trained", responses=error_responses(401, 403))
async def show_statement(_: Annotated[None, Depends(require("read"))]) -> Statement:
    """Returns the words that `consent` in POST /trainings stands for."""
    return Statement(version=STATEMENT, text=STATEMENTS[STATEMENT])


def _request(form: FormData) -> TrainingRequest:
    fields = {name: value for name, value in form.items() if name not in (PICTURES, ARCHIVE)}
    try:
        return TrainingRequest.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


def _files(form: FormData) -> Iterator[tuple[str, bytes]]:
    """Yields the pictures that were sent, one after the other.

    Raises:
        InvalidRequest: there are none, or an archive besides.
    """
    sent, archives = _uploads(form, PICTURES), _uploads(form, ARCHIVE)
    if len(archives) + bool(sent) != 1:
        raise InvalidRequest("send pictures or one archive", "Repeat the field `pictures`, or send a ZIP as `archive`.")
    for archive in archives:
        yield from photos.in_archive(archive.file)
    for upload in sent:
        yield upload.filename or "", upload.file.read(MOST_BYTES + 1)


def _uploads(form: FormData, field: str) -> list[UploadFile]:
    sent = form.getlist(field)
    if not all(isinstance(one, UploadFile) for one in sent):
        raise InvalidRequest(f"{field} is a file", f"With curl: -F {field}=@FILE.")
    return [one for one in sent if isinstance(one, UploadFile)]


def _verdicts(chosen: Chosen) -> list[dict[str, Any]]:
    return [{"name": name, "good": reason is None, "reason": reason} for name, reason in chosen.verdicts]


def _base(settings: Settings, named: str | None) -> ModelSource:
    """Returns a base that the operator configured. Raises InvalidRequest for any other."""
    configured = {source.base: source.without_lora().itself() for source in settings.user_models.values()}
    if named is None:
        return settings.source_for(DEFAULT_USER).without_lora().itself()
    if named not in configured:
        raise InvalidRequest(f"there is no base {named}", f"There are {', '.join(sorted(configured))}.")
    return configured[named]
