"""The HTTP server: `create_app(settings)` makes it, `python main.py` and `uvicorn main:app` run it."""

import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

if __package__ in (None, ""):  # started from inside api/: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastapi import FastAPI

from api import __version__
from api.config import Settings, load_settings
from api.domain.metrics import Metrics
from api.domain.users import offer_setup
from api.errors import SettingsError, SitterError
from api.model_service import ModelService
from api.routes import (
    accounts,
    admin,
    cache,
    generate,
    health,
    images,
    jobs,
    metrics,
    models,
    privacy,
    setup,
    trainings,
    uploads,
)
from api.routes.docs import add_docs
from api.routes.errors import add_error_handlers, error_responses
from api.routes.guard import add_guard
from api.routes.limits import BodyLimit
from api.routes.observed import Observed
from api.routes.pages import add_pages
from api.store.files import PictureFolder
from api.wiring import MakeModels, Service, migrate_database, open_service, working

DESCRIPTION = """Draws people from their own fine-tuned models: `sks person` in a prompt is whoever `user_id` names.

Every error has one shape: `{"error": code, "detail": what happened, "hint": what to do}`."""


def create_app(settings: Settings, make_models: MakeModels = ModelService) -> FastAPI:
    """Returns the application. The service opens with its lifespan; torch is imported in the background then."""
    counters = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_service(settings, counters, make_models) as service, working(service, settings.workers):
            app.state.service = service
            await offer_setup(service.accounts)
            with _draining_when_told(service):
                yield

    app = FastAPI(
        title="Sitter",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=error_responses(400, 401, 403, 408, 413, 422, 429, 500, 503, 507),  # what any route may answer
    )
    app.add_middleware(BodyLimit)
    add_error_handlers(app)
    for room in (
        generate,
        jobs,
        images,
        models,
        uploads,
        trainings,
        accounts,
        privacy,
        admin,
        setup,
        health,
        metrics,
        cache,
    ):
        app.include_router(room.router)
    add_docs(app)
    add_pages(app)
    add_guard(app, settings)
    app.add_middleware(Observed, metrics=counters)  # last, so that it sees every answer
    return app


@contextmanager
def _draining_when_told(service: Service) -> Iterator[None]:
    """Takes no more jobs from the moment the process is told to end, before the server has said its goodbyes."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's; tests have others
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}

    def told(kind: int, frame: FrameType | None) -> None:
        service.worker.drain()
        if callable(handler := before[signal.Signals(kind)]):
            handler(kind, frame)

    for kind in before:
        signal.signal(kind, told)
    try:
        yield
    finally:
        for kind, handler in before.items():
            if signal.getsignal(kind) is told:
                signal.signal(kind, handler)


def __getattr__(name: str) -> FastAPI:
    """Makes `app` for `uvicorn main:app` when it is asked for: importing this module reads no settings."""
    if name == "app":
        try:
            settings = load_settings()
            PictureFolder(settings.output_dir).check()
            migrate_database(settings)
        except SettingsError as error:
            print(f"{error}\nThe README lists every setting.", file=sys.stderr)
            raise SystemExit(2) from error
        except SitterError as error:
            print(f"{error.detail}\n{error.hint}", file=sys.stderr)
            raise SystemExit(1) from error
        return create_app(settings)
    raise AttributeError(name)


if __name__ == "__main__":
    from api.cli import app as command

    command(["serve"])
