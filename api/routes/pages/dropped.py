"""A PNG is dropped on a page, or chosen: what it says of how it was made fills in the form. Nothing of it is kept."""

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from api.domain import png_text
from api.errors import InvalidRequest
from api.routes.caller import AccountsDep
from api.routes.forms import uploads
from api.routes.pages.asked import draft_from
from api.routes.pages.create import studio
from api.routes.pages.look import PageRoute
from api.routes.pages.visitor import sent
from api.routes.service import ServiceDep

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.post("/page/dropped")
async def dropped(request: Request, accounts: AccountsDep, service: ServiceDep) -> Response:
    """Returns the page to draw on, its form filled in."""
    async with sent(request, accounts, 1) as (visitor, form):
        files = [file for file in uploads(form, "picture") if file.size]
        if not files:
            raise InvalidRequest(
                "no picture was chosen", "Choose a PNG from here or from A1111, or drop it on the page."
            )
        recipe = await anyio.to_thread.run_sync(png_text.read, files[0].file)
    answer = await studio(request, visitor, service, draft_from(recipe), recipe.left_out)
    answer.headers["HX-Push-Url"] = "/"
    return answer
