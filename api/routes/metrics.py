"""GET /metrics."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials

from api.domain.metrics import queue_state
from api.routes.caller import AccountsDep, bearer, get_caller, session_cookie
from api.routes.errors import error_responses
from api.routes.service import ServiceDep

router = APIRouter(tags=["Service"])


async def _may_scrape(
    request: Request,
    service: ServiceDep,
    accounts: AccountsDep,
    sent: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    session: Annotated[str | None, Security(session_cookie)],
) -> None:
    """Lets a scraper pass that knows METRICS_TOKEN, and administrators."""
    token = service.settings.metrics_token
    if token and sent and hmac.compare_digest(sent.credentials.encode(), token.get_secret_value().encode()):
        return
    (await get_caller(request, accounts, sent, session)).may("admin")


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
