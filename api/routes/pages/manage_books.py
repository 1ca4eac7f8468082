"""/manage/usage, /manage/audit and /manage/settings: what the server keeps books of. For administrators."""

import json
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from api.config import Settings
from api.domain import admin
from api.errors import InvalidRequest
from api.routes.pages.charts import columns, share
from api.routes.pages.forms import Blank
from api.routes.pages.look import PageRoute, page
from api.routes.pages.visitor import AdminDep
from api.routes.service import ServiceDep
from api.wire.text import Text

router = APIRouter(route_class=PageRoute, include_in_schema=False)

DAYS = (7, 30, 90)
MOST_DAYS = 400  # each is a column of a chart
MOST_ROWS = 20  # of a table
ON_A_PAGE = 50
Measure = Literal["images", "steps", "seconds"]


@router.get("/manage/usage")
async def usage(
    request: Request,
    visitor: AdminDep,
    service: ServiceDep,
    begin: Annotated[date | None, Blank, Query(alias="from")] = None,
    end: Annotated[date | None, Blank, Query(alias="to")] = None,
    measure: Measure = "images",
) -> Response:
    """What was drawn, by day, by user and by model."""
    last = end or datetime.now(UTC).date()
    first = begin or last - timedelta(days=min(DAYS[1], last.toordinal()) - 1)
    if not 0 <= (last - first).days < MOST_DAYS:
        raise InvalidRequest("these days cannot be shown", f"Choose up to {MOST_DAYS} days, the first one first.")
    by_day = await admin.usage(service.database, first, last, "day")
    drawn = {row.day: float(getattr(row, measure)) for row in by_day.rows if row.day}
    every = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    today = datetime.now(UTC).date()
    return page(
        request,
        visitor,
        "manage_usage.html",
        first=first,
        last=last,
        measure=measure,
        spans={days: _query(today - timedelta(days=days - 1), today, measure) for days in DAYS},
        measures={one: _query(first, last, one) for one in ("images", "steps", "seconds")},
        chart=columns([(day.isoformat(), drawn.get(day, 0.0)) for day in every]),
        days=by_day.rows,
        users=share((await admin.usage(service.database, first, last, "user")).rows, measure, MOST_ROWS),
        models=share((await admin.usage(service.database, first, last, "model")).rows, measure, MOST_ROWS),
        total=sum(drawn.values()),
    )


def _query(first: date, last: date, measure: str) -> str:
    return "?" + urlencode({"from": first, "to": last, "measure": measure})


@router.get("/manage/audit")
async def audit(
    request: Request,
    visitor: AdminDep,
    service: ServiceDep,
    actor: Annotated[Text | None, Blank, Query(max_length=64)] = None,
    action: Annotated[Text | None, Blank, Query(max_length=64)] = None,
    before: Annotated[int | None, Blank, Query(ge=1, le=2**31 - 1)] = None,
) -> Response:
    """What was done to accounts, keys and models, and by whom."""
    found = await admin.list_audit(service.database, before, ON_A_PAGE, actor, action)
    asked = {name: value for name, value in (("actor", actor), ("action", action)) if value}
    older = found.before and "?" + urlencode({**asked, "before": found.before})
    told = [(line, datetime.fromisoformat(line.at), _json(line.detail) if line.detail else "") for line in found.lines]
    return page(request, visitor, "manage_audit.html", lines=told, actor=actor, action=action, older=older)


@router.get("/manage/settings")
async def settings(request: Request, visitor: AdminDep, service: ServiceDep) -> Response:
    """Every setting in force, and where it was read."""
    origins = service.settings.origins
    told = [
        (name, _json(value), Settings.model_fields[name.lower()].description, origins.get(name))
        for name, value in admin.settings_in_force(service.settings).items()
    ]
    return page(request, visitor, "manage_settings.html", told=sorted(told, key=lambda one: one[3] is None))


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
