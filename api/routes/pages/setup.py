"""/setup: the form behind the link that makes the first administrator."""

from fastapi import APIRouter, Request, Response

from api.routes.pages.look import PageRoute, page

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/setup")
async def setup(request: Request) -> Response:
    """The form. What it sends goes to POST /setup, with the link's secret: that stands behind `#`.

    Browsers keep what stands there to themselves: no log and no Referer has it, and a script alone reads it.
    """
    return page(request, None, "setup.html")
