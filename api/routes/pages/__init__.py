"""The pages that people look at: templates filled in with what the API's own functions return."""

from fastapi import FastAPI

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
