"""/manage: what runs and waits now, what was asked for, and what is in memory. For administrators."""

from datetime import UTC, date, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from api.config import UserId
from api.domain import admin, history
from api.domain.admin import WantedRequests
from api.domain.alerts import alerts
from api.domain.metrics import queue_state
from api.routes import cache
from api.routes.jobs import cancel_job
from api.routes.pages.forms import Blank
from api.routes.pages.look import PageRoute, go, is_part, page
from api.routes.pages.visitor import AdminDep
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.jobs import Status
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

MOST_NOW = 25  # that run, and that wait
ON_A_PAGE = 40
STATES: tuple[Status, ...] = ("queued", "running", "succeeded", "failed", "cancelled")


@router.get("/manage")
async def manage(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """What happens now, and what is wrong."""
    return page(request, visitor, "manage.html", **await _now(service), **await _alerts(service))


@router.get("/page/manage/now")
async def now(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """The part of /manage that changes all the time."""
    return page(request, visitor, "_now.html", **await _now(service))


@router.get("/page/manage/alerts")
async def wrong(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """The part of /manage that says what is wrong."""
    return page(request, visitor, "_alerts.html", **await _alerts(service))


@router.post("/page/manage/jobs/{job_id}/cancel")
async def cancel(request: Request, job_id: Id, visitor: AdminDep, service: ServiceDep) -> Response:
    """Stops anybody's job."""
    await cancel_job(await history.find(service.database, visitor.caller, job_id), service, visitor.caller)
    return await now(request, visitor, service) if is_part(request) else go(request, "/manage")


@router.get("/manage/requests")
async def requests(
    request: Request,
    visitor: AdminDep,
    service: ServiceDep,
    user: Annotated[UserId | None, Blank] = None,
    status: Annotated[Status | None, Blank] = None,
    words: Annotated[Text | None, Blank, Query(max_length=200)] = None,
    begin: Annotated[date | None, Blank, Query(alias="from")] = None,
    end: Annotated[date | None, Blank, Query(alias="to")] = None,
    before: Annotated[Id | None, Blank] = None,
) -> Response:
    """What everybody asked for, newest first."""
    wanted = WantedRequests(user, status, words, begin, end)
    found = await admin.list_requests(service.database, wanted, before, ON_A_PAGE)
    asked = {"user": user, "status": status, "words": words, "from": begin, "to": end}
    older = {**asked, "before": found.before}
    return page(
        request,
        visitor,
        "manage_requests.html",
        found=found.requests,
        asked=asked,
        older=found.before and "?" + urlencode({name: value for name, value in older.items() if value}),
        states=STATES,
    )


@router.get("/manage/models")
async def models(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """What is in memory, and on which device."""
    return page(request, visitor, "manage_models.html", **await _memory(service), freed=None)


@router.get("/page/manage/models")
async def memory(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """The part of /manage/models that changes."""
    return page(request, visitor, "_memory.html", **await _memory(service))


@router.post("/manage/models/free")
async def free(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """Frees the models that are idle."""
    freed = await cache.clear_cache(service) if service.models.memory() else None
    part = "_freed.html" if is_part(request) else "manage_models.html"
    return page(request, visitor, part, **await _memory(service), freed=freed)


async def _now(service: Service) -> dict[str, Any]:
    running, waiting = await admin.under_way(service.database, MOST_NOW)
    return {
        "running": running,
        "waiting": waiting,
        "queue": await queue_state(service.database),
        "memory": service.models.memory(),
    }


async def _alerts(service: Service) -> dict[str, Any]:
    today = datetime.now(UTC).date()
    drawn = (await admin.usage(service.database, today, today, "day")).rows
    return {
        "alerts": await alerts(service.database, service.readiness),
        "free_bytes": await service.readiness.free_bytes(),
        "today": drawn[0].images if drawn else 0,
    }


async def _memory(service: Service) -> dict[str, Any]:
    there = service.models.memory() is not None  # else the engine starts, or could not
    return {
        "cache": await cache.show_cache(service) if there else None,
        "engine": service.models.engine if there else None,
        "reasons": await service.readiness.reasons(),
        "draws": service.settings.workers > 0,
    }
