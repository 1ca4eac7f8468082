"""Models: the list, one and its versions, publishing and rolling back, its files, consent and erasure."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.datastructures import FormData

from api.config import UserId
from api.domain import registry, resumable, uploads
from api.domain.accounts import Caller
from api.domain.models import base_named
from api.domain.uploads import MOST_BYTES, Place, UploadOrder
from api.domain.zips import zipped
from api.errors import InvalidRequest
from api.routes import etags, forms
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.limits import declared_bytes
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.models import Model, ModelChange, ModelList, SendRequest, VersionList
from api.wiring import Service

router = APIRouter(prefix="/models", tags=["Models"])

ModelId = Annotated[Id, Path(description="Names the model.", examples=["019a9f3c2d10b1946ac93f21d07e"])]
Number = Annotated[int, Path(description="Of the version.", ge=1, le=2**31 - 1, examples=[1])]
CACHE = "private, no-cache"  # a version never changes, but it may be taken back
FILE, ARCHIVE = "file", "archive"
SENT = {
    FILE: {
        **forms.FILE,
        "description": "A LoRA of diffusers, peft or kohya, or a checkpoint: safetensors.",
    },
    ARCHIVE: {**forms.FILE, "description": "Instead, a ZIP of the folder of a LoRA or of a whole model."},
}
READ, MANAGE = [Depends(require("read"))], [Depends(require("manage"))]


@router.get("", summary="List models", responses=error_responses(401, 403, 422), dependencies=READ)
async def list_models(
    service: ServiceDep,
    caller: CallerDep,
    user_id: Annotated[UserId | None, Query(description="Whose; for administrators.")] = None,
    before: Annotated[Id | None, Query(description="Older than this model.")] = None,
    limit: Annotated[int, Query(description="Most of your own on a page.", ge=1, le=100)] = 100,
) -> ModelList:
    """Lists your own models, newest first, a page at a time; at the end what the operator configured for you."""
    models = await registry.page(service.registry, caller, user_id, before, limit)
    is_full = len(models) == limit and models[-1].status != "configured"
    return ModelList(models=models, before=models[-1].id if is_full else None)


@router.post(
    "",
    status_code=201,
    summary="Send a model",
    responses=error_responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 503, 507),
    dependencies=[*MANAGE, Depends(forms.one_body)],
    openapi_extra=forms.document(SendRequest, **SENT),
)
async def add_model(http: Request, service: ServiceDep, caller: CallerDep, response: Response) -> Model:
    """Takes a model that was trained elsewhere: checked first, it draws from then on, as the newest version."""
    await uploads.require_room(service.folder, min(MOST_BYTES, declared_bytes(http.scope)))  # over that it is 413
    async with forms.opened(http, 8) as form:
        request = forms.read(form, SendRequest, FILE, ARCHIVE)
        user_id = caller.acts_for(request.user_id)
        order = UploadOrder(
            user_id,
            request.name,
            request.class_noun,
            base_named(service.settings, request.base, user_id),
            caller.name,
            request.consent_days,
            request.hub and f"{request.hub}@{request.revision}",
        )
        async with _sent(form, request, service, caller) as place:
            model_id = await uploads.receive(
                service.settings, service.database, service.folder, service.models, order, place
            )
    response.headers["Location"] = f"/models/{model_id}"
    return await registry.find(service.registry, caller, model_id)


@asynccontextmanager
async def _sent(form: FormData, request: SendRequest, service: Service, caller: Caller) -> AsyncIterator[Place]:
    """Yields what writes the files of the model, wherever they are now."""
    files, archives = forms.uploads(form, FILE), forms.uploads(form, ARCHIVE)
    if len([*files, *archives]) + (request.upload is not None) + (request.hub is not None) != 1:
        hint = "A LoRA or checkpoint as `file`, a folder as `archive`; or an `upload`, or a name on the `hub`."
        raise InvalidRequest("send one file or one archive", hint)
    if request.hub is not None and request.revision is not None:
        caller.may("admin")
        named = request.hub, request.revision, request.filename
        yield lambda part: service.models.fetch(*named, part, MOST_BYTES)
    elif request.upload is not None:
        owner = caller.acts_for(None)
        async with resumable.taken(service.folder.uploads, owner, request.upload, request.filename) as (name, file):
            yield uploads.matching(uploads.named(name, file), file, request.sha256)
    else:
        sent = (files or archives)[0]
        place = uploads.unpacked(sent.file) if archives else uploads.placed(sent.filename or "", sent.file)
        yield uploads.matching(place, sent.file, request.sha256)


@router.get("/{model_id}", summary="Look at a model", responses=error_responses(401, 403, 404), dependencies=READ)
async def show_model(model_id: ModelId, service: ServiceDep, caller: CallerDep) -> Model:
    """Says whom a model shows, which version draws, and what it rests on."""
    return await registry.find(service.registry, caller, model_id)


@router.patch(
    "/{model_id}",
    summary="Rename a model",
    responses=error_responses(401, 403, 404, 409, 422, 503),
    dependencies=MANAGE,
)
async def change_model(model_id: ModelId, change: ModelChange, service: ServiceDep, caller: CallerDep) -> Model:
    """Gives a model another name; requests name it by that from now on."""
    return await registry.rename(service.registry, caller, model_id, change.name)


@router.delete(
    "/{model_id}",
    status_code=204,
    summary="Erase a model",
    responses=error_responses(401, 403, 404, 503),
    dependencies=MANAGE,
)
async def erase_model(model_id: ModelId, service: ServiceDep, caller: CallerDep) -> None:
    """Erases a model for good: its versions, files, photos and jobs under way. The pictures that it drew stay."""
    await registry.erase(service.registry, caller, model_id)


@router.delete(
    "/{model_id}/consent",
    summary="Take a consent back",
    responses=error_responses(401, 403, 404, 503),
    dependencies=MANAGE,
)
async def revoke_consent(model_id: ModelId, service: ServiceDep, caller: CallerDep) -> Model:
    """Takes the consent back: nobody draws with the model any more, and its files and photos are deleted."""
    return await registry.revoke(service.registry, caller, model_id)


@router.get(
    "/{model_id}/versions",
    summary="List a model's versions",
    responses=error_responses(401, 403, 404, 422),
    dependencies=READ,
)
async def list_versions(
    model_id: ModelId,
    service: ServiceDep,
    caller: CallerDep,
    before: Annotated[int | None, Query(description="Older than this version.", ge=1, le=2**31 - 1)] = None,
    limit: Annotated[int, Query(description="Most versions on a page.", ge=1, le=100)] = 100,
) -> VersionList:
    """Lists a model's versions, newest first, a page at a time: how each was made, and how good it is."""
    versions = await registry.versions(service.registry, caller, model_id, before, limit)
    return VersionList(versions=versions, before=versions[-1].version if len(versions) == limit else None)


@router.post(
    "/{model_id}/versions/{number}/publish",
    summary="Publish a version, or roll back to it",
    responses=error_responses(401, 403, 404, 422, 503),
    dependencies=MANAGE,
)
async def publish_version(model_id: ModelId, number: Number, service: ServiceDep, caller: CallerDep) -> Model:
    """Has a version draw from now on: a newer one, or an older one again."""
    return await registry.publish(service.registry, caller, model_id, number)


@router.get(
    "/{model_id}/versions/{number}/files/{name:path}",
    summary="Fetch a file of a version",
    response_class=FileResponse,
    responses={**etags.KNOWN, **error_responses(401, 403, 404, 422)},
    dependencies=READ,
)
async def fetch_file(
    model_id: ModelId,
    number: Number,
    name: Annotated[str, Path(description="As the version lists it.", max_length=100, examples=["sample-1.png"])],
    service: ServiceDep,
    caller: CallerDep,
    if_none_match: etags.IfNoneMatch = None,
) -> Response:
    """Sends a file of a version: its weights, or a picture that shows what it draws."""
    path, sha256 = await registry.file_of(service.registry, caller, model_id, number, name)
    headers = {"ETag": f'"{sha256}"', "Cache-Control": CACHE}
    if etags.is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    return FileResponse(path, headers=headers, filename=name, content_disposition_type="inline")


@router.get(
    "/{model_id}/file",
    summary="Take a model along",
    response_class=FileResponse,
    responses={**etags.KNOWN, **error_responses(401, 403, 404, 422)},
    dependencies=READ,
)
async def fetch_weights(
    model_id: ModelId,
    service: ServiceDep,
    caller: CallerDep,
    version: Annotated[int | None, Query(description="Which; the published one.", ge=1, le=2**31 - 1)] = None,
    style: Annotated[
        Literal["diffusers", "kohya"], Query(description="`kohya` is what A1111 and ComfyUI read.")
    ] = "diffusers",
    if_none_match: etags.IfNoneMatch = None,
) -> Response:
    """Sends a version: a LoRA that diffusers loads, or other programs (kohya's keys); a whole model as a ZIP."""
    model = await registry.find(service.registry, caller, model_id)
    kept = await registry.weights_of(service.registry, caller, model_id, version)
    headers = {"ETag": f'"{kept.sha256}{"-kohya" if style == "kohya" else ""}"', "Cache-Control": CACHE}
    if etags.is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    name = f"{model.name}.safetensors"
    if style == "kohya":
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return Response(await registry.as_kohya(kept), headers=headers, media_type="application/octet-stream")
    if kept.file is not None:
        return FileResponse(kept.file, headers=headers, filename=name)
    headers["Content-Disposition"] = f'attachment; filename="{model.name}.zip"'
    return StreamingResponse(zipped(kept.files, kept.made), headers=headers, media_type="application/zip")
