"""The pages that people look at: templates filled in with what the API's own functions return."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from api.routes.pages import (
    account,
    compare,
    create,
    dropped,
    gallery,
    grid,
    live,
    manage,
    manage_books,
    manage_users,
    people,
    picture,
    setup,
    sign_in,
    train,
    training,
)
from api.routes.pages.assets import Assets
from api.routes.pages.look import nowhere

Handler = Callable[[Request, Any], Any]

ROOMS = (
    *(create, live, gallery, picture, compare, dropped, grid),
    *(train, training, people),  # /people/new before /people/{model_id}
    *(account, manage, manage_users, manage_books, sign_in, setup),
)


def add_pages(app: FastAPI) -> None:
    """Serves the pages from `app`, and all that they and `/docs` are made of."""
    for room in ROOMS:
        app.include_router(room.router)
    app.mount("/static", Assets(), name="static")
    app.add_exception_handler(HTTPException, _readable(app.exception_handlers[HTTPException]))


def _readable(as_json: Handler) -> Handler:
    """Returns what answers errors of HTTP itself: a page to who looks for one that is not there, else `as_json`."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        looks = request.method == "GET" and "text/html" in request.headers.get("Accept", "")
        response: Response = nowhere(request) if looks and error.status_code == 404 else await as_json(request, error)
        return response

    return answer
