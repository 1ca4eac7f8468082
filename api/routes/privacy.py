"""Your own data: what signs your webhooks, taking everything along, and erasing it."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import StreamingResponse

from api.config import UserId
from api.domain import privacy
from api.domain.webhooks import webhook_secret
from api.routes.caller import CallerDep, require
from api.routes.errors import error_responses
from api.routes.service import ServiceDep
from api.wire.privacy import WebhookSecret

router = APIRouter(tags=["Privacy"])

Whose = Annotated[UserId | None, Query(description="Whose; for administrators.")]


@router.get(
    "/me/webhook-secret",
    summary="Show what signs your webhooks",
    responses=error_responses(401, 403, 404, 422, 429, 503),
    dependencies=[Depends(require("manage"))],
)
async def show_webhook_secret(service: ServiceDep, caller: CallerDep, user_id: Whose = None) -> WebhookSecret:
    """Shows the secret by which you can tell that a webhook is this server's (https://www.standardwebhooks.com)."""
    user = caller.acts_for(user_id)
    return WebhookSecret(secret=await webhook_secret(service.database, service.vault, service.settings, user))


@router.get(
    "/me/export",
    summary="Take your data along",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A ZIP file: the account, keys, requests, pictures and usage as JSON, and the pictures.",
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
        },
        **error_responses(401, 403, 404, 422, 429, 503),
    },
    dependencies=[Depends(require("manage"))],
)
async def export(service: ServiceDep, caller: CallerDep, user_id: Whose = None) -> StreamingResponse:
    """Sends everything that is kept about you. Secrets of keys are not: they are not kept."""
    user = caller.acts_for(user_id)
    parts = await privacy.export(service.database, service.pictures, service.vault, service.registry, caller, user)
    headers = {"Content-Disposition": f'attachment; filename="sitter-{user}.zip"', "Cache-Control": "no-store"}
    return StreamingResponse(parts, media_type="application/zip", headers=headers)


@router.delete(
    "/users/{user_id}",
    status_code=204,
    summary="Erase a user",
    responses=error_responses(401, 403, 404, 409, 422, 429, 503),
    dependencies=[Depends(require("manage"))],
)
async def erase_user(
    user_id: Annotated[UserId, Path(description="You, or anybody for administrators.", examples=["ada"])],
    service: ServiceDep,
    caller: CallerDep,
) -> None:
    """Erases a user for good: jobs, pictures, prompts, keys and files. Sums of use stay, under no name."""
    await privacy.erase(service.database, service.pictures, service.vault, service.registry, caller, user_id)
