"""/grid: one drawing with two of its values varied, side by side."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.sse import ServerSentEvent

from api.domain import grids, library
from api.domain.history import ENDED
from api.domain.sheets import sheet
from api.errors import NotFound, SitterError
from api.routes.jobs import Events, accept, cancel_job, streamed
from api.routes.pages.asked import SAMPLERS, SHAPES, chosen, defaults, draft_of, expected, key_of
from api.routes.pages.forms import get_form
from api.routes.pages.live import AT_LEAST, HowDep, change, counted, identified_lately
from api.routes.pages.look import PageRoute, as_ours, go, is_part, page, render
from api.routes.pages.plans import Plan, planned, suggestions
from api.routes.pages.sitters import sitters
from api.routes.pages.table import Table, table
from api.routes.pages.visitor import Reading, Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

FIRST = {"x": "num_inference_steps", "y": "guidance_scale"}
GridId = Annotated[Text, Path(max_length=64)]
_one_at_a_time = CapacityLimiter(1)  # sheets: each is some forty megabytes while it is made


@router.get("/grid")
async def plan(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    image: Annotated[Text | None, Query(max_length=64)] = None,
) -> Response:
    """The form of a grid, filled in as the picture `image` was drawn."""
    draft: dict[str, Any] = {}
    if image:
        draft = draft_of(await library.find(service.database, service.vault, visitor.caller, image), same_seed=True)
    return await _form(request, visitor, service, draft, None)


@router.post("/grid")
async def draw(request: Request, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Accepts every cell, or none; leads to the grid."""
    form = await get_form(request)
    grid_id = grids.new_grid(key_of(form), form)
    try:
        await _accept(service, visitor, grid_id, planned(form, await sitters(service, visitor), grid_id))
    except (SitterError, RequestValidationError) as error:
        return await _form(request, visitor, service, dict(form), as_ours(error))
    return go(request, f"/grid/{grid_id}")


@router.post("/page/grid/estimate")
async def estimate(request: Request, visitor: VisitorDep, service: ServiceDep) -> Response:
    """How many pictures that would be, and how long they would take."""
    form = await get_form(request)
    form["prompt"] = form.get("prompt", "").strip() or "-"
    try:
        made = planned(form, await sitters(service, visitor), grids.new_grid())
    except (SitterError, RequestValidationError) as error:
        return page(request, visitor, "_plan.html", plan=None, error=as_ours(error), seconds=None)
    seconds = await expected(service, *made.orders.values())
    return page(request, visitor, "_plan.html", plan=made, error=None, seconds=seconds)


@router.get("/grid/{grid_id}")
async def show(request: Request, grid_id: GridId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """The grid, as far as it is."""
    shown = await _table(service, visitor, grid_id)
    return page(request, visitor, "grid.html", table=shown)


async def _there(grid_id: GridId, visitor: VisitorDep, service: ServiceDep) -> None:
    """Raises NotFound while that is still an answer, and not the end of a stream."""
    await grids.find(service.database, visitor.caller, grid_id)


@router.get("/page/grid/{grid_id}/live", response_class=Events, dependencies=[Depends(_there), Depends(counted)])
async def live(
    grid_id: GridId, visitor: VisitorDep, service: ServiceDep, how: HowDep
) -> AsyncIterator[ServerSentEvent]:
    """Sends what changed in the grid, until all of it has ended."""
    async with streamed(_changes(service, visitor, how, grid_id)) as found:
        async for one in found:
            yield ServerSentEvent(raw_data=one)


@router.post("/page/grid/{grid_id}/cancel")
async def cancel(request: Request, grid_id: GridId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Stops what has not ended; what comes of that the stream tells."""
    grid = await grids.find(service.database, visitor.caller, grid_id)
    for seen in grid.cells.values():
        if seen.job.status not in ENDED:
            await cancel_job(seen, service, visitor.caller)
    return Response(status_code=204) if is_part(request) else go(request, f"/grid/{grid_id}")


@router.get("/grid/{grid_id}/file")
async def download(grid_id: GridId, visitor: VisitorDep, service: ServiceDep, how: HowDep) -> Response:
    """The grid as one picture."""
    shown = await _table(service, visitor, grid_id)
    if not shown.done:
        raise NotFound("no picture of this grid is done yet", "Come back once one is.")
    corner = [render(how, "_axis.html", axis=axis).strip() for axis in (shown.grid.x, shown.grid.y) if axis]
    columns, rows = [[label or "–" for label in side] for side in (shown.columns, shown.rows)]

    def png_at(column: int, row: int) -> bytes | None:
        name = shown.file_at(column, row)
        return service.pictures.read(name) if name else None

    png = await anyio.to_thread.run_sync(sheet, corner, columns, rows, shown.size, png_at, limiter=_one_at_a_time)
    headers = {"Content-Disposition": f'attachment; filename="grid_{grid_id}.png"'}
    return Response(png, media_type="image/png", headers=headers)


async def _form(
    request: Request, visitor: Visitor, service: Service, draft: dict[str, Any], error: SitterError | None
) -> Response:
    everybody = await sitters(service, visitor, draft.get("who"))
    suggested = suggestions(everybody)
    filled = defaults() | FIRST | {f"{side}_values": suggested[axis] for side, axis in FIRST.items()} | draft
    return page(
        request,
        visitor,
        "plan.html",
        error.status if error else 200,
        sitters=everybody,
        chosen=chosen(everybody, draft.get("who")),
        draft=filled,
        suggested=suggested,
        shapes=SHAPES,
        samplers=SAMPLERS,
        key=grids.new_grid(),
        error=error,
    )


async def _accept(service: Service, visitor: Visitor, grid_id: str, made: Plan) -> None:
    """Accepts every cell, or none: what was accepted beside one that was not is stopped."""
    waiting = [
        accept(order, service, visitor.caller, grids.key_of(grid_id, place)) for place, order in made.orders.items()
    ]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    refusal = next((answer for answer in answers if isinstance(answer, BaseException)), None)
    if refusal is None:
        return
    for answer in answers:
        if not isinstance(answer, BaseException):
            await cancel_job(answer, service, visitor.caller)
    raise refusal


async def _table(service: Service, visitor: Visitor, grid_id: str) -> Table:
    grid = await grids.find(service.database, visitor.caller, grid_id)
    return await table(service, visitor, grid, {one.value: one.name for one in await sitters(service, visitor)})


async def _changes(service: Service, visitor: Visitor, how: Reading, grid_id: str) -> AsyncGenerator[str]:
    names = {one.value: one.name for one in await sitters(service, visitor)}
    told, identified = set[tuple[Any, ...]](), time.monotonic()
    while not service.worker.draining:
        grid = await grids.find(service.database, visitor.caller, grid_id)
        states = {at: (at, seen.job.revision, seen.job.preview_step) for at, seen in grid.cells.items()}
        if news := {at for at, state in states.items() if state not in told}:
            told = set(states.values())
            shown = await table(service, visitor, grid, names)
            yield render(how, "_cells.html", visitor=visitor, table=shown, news=sorted(news))
        active = [seen.job.id for seen in grid.cells.values() if seen.job.status not in ENDED]
        if not active:
            return
        await asyncio.sleep(AT_LEAST)
        await change(service.wake, active)
        visitor, identified = await identified_lately(service, visitor, identified)
