"""/compare: two pictures over each other, and what was different when they were drawn."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.domain import library
from api.domain.library import Wanted
from api.routes.pages import cards
from api.routes.pages.look import PageRoute, page
from api.routes.pages.visitor import Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.images import Image
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

STRIP = 16  # pictures to choose the other one from
ImageId = Annotated[Text, Query(max_length=64)]


@router.get("/compare")
async def compare(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    a: ImageId,
    b: ImageId | None = None,
    before: ImageId | None = None,
) -> Response:
    """`a` and `b`, and others to put in the place of `b`, those older than `before`."""
    left = await library.find(service.database, service.vault, visitor.caller, a)
    right = await library.find(service.database, service.vault, visitor.caller, b) if b else None
    found = await _others(service, visitor, before)
    others = [image for image in found if image.id not in (a, b)]
    older = found[-1].id if len(found) == STRIP else None
    return page(request, visitor, "compare.html", left=left, right=right, others=others, older=older, who=cards.who)


async def _others(service: Service, visitor: Visitor, before: str | None) -> list[Image]:
    owner = visitor.caller.user_id
    return await library.page(service.database, service.vault, visitor.caller, owner, Wanted(), before, STRIP)
