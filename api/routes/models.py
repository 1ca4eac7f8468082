"""Models: the list, one and its versions, publishing and rolling back, its files, consent and erasure."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import FileResponse

from api.config import UserId
from api.domain import registry
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.models import Model, ModelChange, ModelList, VersionList

router = APIRouter(prefix="/models", tags=["Models"])

ModelId = Annotated[Id, Path(description="Names the model.", examples=["019a9f3c2d10b1946ac93f21d07e"])]
Number = Annotated[int, Path(description="Of the version.", ge=1, le=2**31 - 1, examples=[1])]
CACHE = "private, max-age=31536000, immutable"  # a version never changes
READ, MANAGE = [Depends(require("read"))], [Depends(require("manage"))]


@router.get("", summary="List models", responses=error_responses(401, 403, 422), dependencies=READ)
async def list_models(
    service: ServiceDep,
    caller: CallerDep,
    user_id: Annotated[UserId | None, Query(description="Whose; for administrators.")] = None,
) -> ModelList:
    """Lists your own models, and at the end what the operator configured for you."""
    return ModelList(models=await registry.page(service.registry, caller, user_id))


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
    responses=error_responses(401, 403, 404),
    dependencies=READ,
)
async def list_versions(model_id: ModelId, service: ServiceDep, caller: CallerDep) -> VersionList:
    """Lists a model's versions, newest first: how each was made, and how good it is."""
    return VersionList(versions=await registry.versions(service.registry, caller, model_id))


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
    "/{model_id}/versions/{number}/files/{name}",
    summary="Fetch a file of a version",
    response_class=FileResponse,
    responses=error_responses(401, 403, 404, 422),
    dependencies=READ,
)
async def fetch_file(
    model_id: ModelId,
    number: Number,
    name: Annotated[str, Path(description="As the version lists it.", max_length=100, examples=["sample-1.png"])],
    service: ServiceDep,
    caller: CallerDep,
) -> FileResponse:
    """Sends a file of a version: its weights, or a picture that shows what it draws."""
    path, sha256 = await registry.file_of(service.registry, caller, model_id, number, name)
    headers = {"ETag": f'"{sha256}"', "Cache-Control": CACHE}
    return FileResponse(path, headers=headers, filename=name, content_disposition_type="inline")


@router.get(
    "/{model_id}/file",
    summary="Take a model along",
    response_class=FileResponse,
    responses=error_responses(401, 403, 404, 422),
    dependencies=READ,
)
async def fetch_weights(
    model_id: ModelId,
    service: ServiceDep,
    caller: CallerDep,
    version: Annotated[int | None, Query(description="Which; the published one.", ge=1, le=2**31 - 1)] = None,
) -> FileResponse:
    """Sends the weights of a version as a LoRA that diffusers loads (safetensors)."""
    model = await registry.find(service.registry, caller, model_id)
    path, sha256 = await registry.file_of(service.registry, caller, model_id, version)
    return FileResponse(path, headers={"ETag": f'"{sha256}"'}, filename=f"{model.name}.safetensors")
