"""/: say what to draw, watch it appear, keep it."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api.domain import history, library
from api.routes.jobs import accept, cancel_job
from api.routes.pages import cards
from api.routes.pages.asked import (
    SAMPLERS,
    SHAPES,
    chosen,
    defaults,
    draft_of,
    expected,
    key_of,
    new_key,
    order_of,
)
from api.routes.pages.forms import get_form
from api.routes.pages.live import pictures
from api.routes.pages.look import PageRoute, go, is_part, page
from api.routes.pages.sitters import sitters
from api.routes.pages.training import under_way
from api.routes.pages.visitor import Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.jobs import JobRequest
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

COUNTS = (1, 2, 4)
EXAMPLES = ("as a futuristic astronaut", "as a knight in a castle", "as a wizard in a forest", "on a beach")


@router.get("/")
async def create(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    image: Annotated[Text | None, Query(max_length=64)] = None,
    same: bool = False,
    who: Annotated[Text | None, Query(max_length=140)] = None,
) -> Response:
    """The page to draw on: the form, what is being drawn, and what was drawn lately.

    `image` has it draw that picture again, `same` with its seed.
    """
    draft: dict[str, Any] = {"who": who}
    if image:
        draft = draft_of(await library.find(service.database, service.vault, visitor.caller, image), same)
    return await studio(request, visitor, service, draft)


async def studio(
    request: Request, visitor: Visitor, service: Service, draft: dict[str, Any], left_out: Sequence[str] = ()
) -> Response:
    """Returns the page to draw on, its form filled in with `draft`; `left_out` is what that should say and cannot."""
    everybody = await sitters(service, visitor, draft.get("who"))
    found = await cards.lately(service, visitor)
    return page(
        request,
        visitor,
        "create.html",
        here="/",
        sitters=everybody,
        chosen=chosen(everybody, draft.get("who")),
        draft=defaults() | draft,
        left_out=left_out,
        cards=await cards.cards(service, visitor, found),
        lately=await pictures(service, visitor),
        learning=list((await under_way(service, visitor)).values()),
        shapes=SHAPES,
        counts=COUNTS,
        samplers=SAMPLERS,
        examples=EXAMPLES,
        key=new_key(),
        seconds=await expected(service, JobRequest(prompt="-")),
    )


@router.post("/")
async def draw(request: Request, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Accepts what the form asks for. What comes of it the page's stream tells: an answer might overtake newer news."""
    form = await get_form(request)
    await accept(order_of(form), service, visitor.caller, key_of(form))
    return page(request, visitor, "_key.html", key=new_key()) if is_part(request) else go(request, "/")


@router.post("/page/estimate")
async def estimate(request: Request, visitor: VisitorDep, service: ServiceDep) -> Response:
    """How long what the form says would take now."""
    form = await get_form(request)
    order = order_of(form | {"prompt": form.get("prompt", "").strip() or "-"})
    return page(request, visitor, "_estimate.html", seconds=await expected(service, order))


@router.post("/page/jobs/{job_id}/cancel")
async def cancel(request: Request, job_id: Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Stops a job; what comes of that the page's stream tells."""
    seen = await history.find(service.database, visitor.caller, job_id)
    await cancel_job(seen, service, visitor.caller)
    return Response(status_code=204) if is_part(request) else go(request, "/")
