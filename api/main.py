"""The HTTP server: `create_app(settings)` makes it, `python main.py` and `uvicorn main:app` run it."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

if __package__ in (None, ""):  # started from inside api/: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastapi import FastAPI

from api import __version__
from api.config import Settings, load_settings
from api.errors import SettingsError, StorageUnavailable
from api.routes import cache, generate, health
from api.routes.docs import add_docs
from api.routes.errors import add_error_handlers
from api.routes.limits import BodyLimit
from api.routes.service import Waiting
from api.store.files import PictureFolder
from api.wiring import open_service

DESCRIPTION = """Draws people from their own fine-tuned models: `sks person` in a prompt is whoever `user_id` names.

Every error has one shape: `{"error": code, "detail": what happened, "hint": what to do}`."""


def create_app(settings: Settings) -> FastAPI:
    """Returns the application. The service opens with its lifespan; torch is imported in the background then."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with open_service(settings) as service:
            app.state.service = service
            app.state.waiting = Waiting(settings.max_waiting)
            yield

    app = FastAPI(
        title="Sitter",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(BodyLimit)
    add_error_handlers(app)
    for room in (generate, health, cache):
        app.include_router(room.router)
    add_docs(app)
    return app


def __getattr__(name: str) -> FastAPI:
    """Makes `app` for `uvicorn main:app` when it is asked for: importing this module reads no settings."""
    if name == "app":
        try:
            settings = load_settings()
            PictureFolder(settings.output_dir).check()
        except SettingsError as error:
            print(f"{error}\nThe README lists every setting.", file=sys.stderr)
            raise SystemExit(2) from error
        except StorageUnavailable as error:
            print(f"{error.detail}\n{error.hint}", file=sys.stderr)
            raise SystemExit(1) from error
        return create_app(settings)
    raise AttributeError(name)


if __name__ == "__main__":
    from api.cli import app as command

    command(["serve"])
