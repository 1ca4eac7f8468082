"""GET /metrics."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials

from api.domain.accounts import authenticate
from api.domain.metrics import queue_state
from api.routes.caller import AccountsDep, CredentialsDep, bearer
from api.routes.errors import error_responses
from api.routes.service import ServiceDep

router = APIRouter(tags=["Service"])


async def _may_scrape(
    service: ServiceDep,
    accounts: AccountsDep,
    token_sent: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    sent: CredentialsDep,
) -> None:
    """Lets a scraper pass that knows METRICS_TOKEN, and administrators."""
    token = service.settings.metrics_token
    if token and token_sent and hmac.compare_digest(token_sent.credentials.encode(), token.get_secret_value().encode()):
        return
    (await authenticate(accounts, sent)).may("admin")


@router.get(
    "/metrics",
    summary="Counters for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Every counter."}, **error_responses(401, 403)},
    dependencies=[Depends(_may_scrape)],
)
async def show_metrics(request: Request, service: ServiceDep) -> Response:
    """Shows the counters of this process, and the queue; for administrators, or with METRICS_TOKEN."""
    ready = not await service.readiness.reasons()
    queue = await queue_state(service.database)
    page, media_type = service.metrics.page(request.headers.get("Accept", ""), ready, queue)
    return Response(page, headers={"Content-Type": media_type})
