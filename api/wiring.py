"""Makes every object of the service once, and hands each only what it needs."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TextIO, cast

import structlog

from api.config import Settings
from api.domain import deadlines, leftovers, once, privacy
from api.domain.accounts import Accounts
from api.domain.generate import Studio
from api.domain.library import keep_swept
from api.domain.metrics import Metrics
from api.domain.readiness import Readiness
from api.domain.registry import Registry
from api.domain.submit import Desk
from api.domain.wake import Wake
from api.domain.webhooks import Deliverer
from api.domain.worker import Worker
from api.errors import DatabaseNewer, DatabaseUnavailable, DeviceLost, EngineUnavailable
from api.model_service import ModelService
from api.store.database import Database, migrate
from api.store.files import PictureFolder
from api.store.models import ModelFolder
from api.store.vault import Vault, load_vault

MakeModels = Callable[[Settings], ModelService]
Chore = Callable[[], Awaitable[None]]
DEVICE_SECONDS = 2.0  # between looks at the device
NEWER_SECONDS = 5.0  # between looks at whose tables the database has
AGAIN_SECONDS = 1.0  # until a chore is begun anew
log = structlog.get_logger()
GRACEFUL_SECONDS = 7  # under the 10 that container runtimes wait before they kill


@dataclass(frozen=True)
class Service:
    """What the routes and the CLI are given."""

    settings: Settings
    models: ModelService
    pictures: PictureFolder
    folder: ModelFolder
    database: Database
    vault: Vault
    accounts: Accounts
    wake: Wake
    desk: Desk
    worker: Worker
    metrics: Metrics
    readiness: Readiness

    @property
    def registry(self) -> Registry:
        """What looking after models needs."""
        return Registry(self.settings, self.database, self.folder, self.models, self.wake)


def migrate_database(settings: Settings) -> None:
    """Brings the database to this version's tables."""
    migrate(settings.database)


@contextmanager
def open_models(settings: Settings, make: MakeModels = ModelService) -> Iterator[ModelService]:
    """Opens the models alone inside the block; torch is imported in the background meanwhile."""
    configure_logging(settings.log_level)
    models = make(settings)
    try:
        yield models
    finally:
        models.close()


@asynccontextmanager
async def open_service(
    settings: Settings, metrics: Metrics | None = None, make_models: MakeModels = ModelService
) -> AsyncIterator[Service]:
    """Opens the service inside the block, over a database brought to this version; nothing is drawn yet.

    Args:
        settings: everything that can be set.
        metrics: where it counts, if somebody else counts there too.
        make_models: makes what draws.
    """
    metrics = metrics or Metrics()
    with open_models(settings, make_models) as models:
        await asyncio.to_thread(migrate_database, settings)
        metrics.watch(models)
        database = Database(settings.database, metrics.database_failed)
        vault, wake = load_vault(settings), Wake()
        pictures = PictureFolder(settings.output_dir)
        folder = ModelFolder(settings.data_dir)
        worker = Worker(settings, database, Studio(models, pictures, vault, database, folder), wake, metrics)
        desk = Desk(settings, database, vault, wake)
        accounts = Accounts(settings, database, vault)
        readiness = Readiness(database, models, pictures, worker, draws=settings.workers > 0)
        try:
            yield Service(
                settings, models, pictures, folder, database, vault, accounts, wake, desk, worker, metrics, readiness
            )
        finally:
            await database.close()


@asynccontextmanager
async def working(service: Service, slots: int) -> AsyncIterator[None]:
    """Draws up to `slots` jobs at once inside the block, sends webhooks, and removes files that belong to nothing.

    At the end of the block the jobs in hand are finished or put back.
    """
    deliverer = Deliverer(service.settings, service.database, service.vault, service.wake, service.metrics)
    chores: list[Chore] = [
        deliverer.run,
        partial(deadlines.keep_giving_up, service.database, service.wake, service.metrics),
        partial(keep_swept, service.pictures, service.database),
        partial(leftovers.keep_swept, service.registry),
        partial(once.keep_forgetting, service.database),
        partial(privacy.keep_forgetting, service.database, service.models),
        partial(_end_beside_newer, service),
    ]
    if slots:
        chores += [partial(service.worker.run, slots), partial(_end_without_device, service)]
    tasks = [asyncio.create_task(_keep_up(chore)) for chore in chores]
    try:
        yield
    finally:
        await service.worker.stop(GRACEFUL_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end_without_device(service: Service) -> None:
    """Ends the process once its device has failed: no library recovers from that, a supervisor starts it anew."""
    while True:
        await asyncio.sleep(DEVICE_SECONDS)
        try:
            await asyncio.to_thread(service.models.check_device)
        except DeviceLost as error:
            log.error(error.code, reason=error.detail)
            await service.worker.stop(0)  # what is in hand goes back to the queue
            os._exit(1)
        except EngineUnavailable:
            return  # it never started: readiness says so, and so does each job


async def _end_beside_newer(service: Service) -> None:
    """Ends the process once a newer version has changed the tables: it would draw, and accept, what it misreads."""
    while True:
        await asyncio.sleep(NEWER_SECONDS)
        try:
            await service.database.require_known()
        except DatabaseUnavailable as error:
            log.warning(error.code, reason=error.detail)
        except DatabaseNewer as error:
            log.error(error.code, reason=error.detail, hint=error.hint)
            await service.worker.stop(GRACEFUL_SECONDS)
            os._exit(1)


async def _keep_up(chore: Chore) -> None:
    """Begins a chore anew that ended by an error which it did not foresee: the server would look well without it."""
    while True:
        try:
            await chore()
        except Exception as error:
            log.error("chore_ended", exc_info=error)
        await asyncio.sleep(AGAIN_SECONDS)


@dataclass(frozen=True)
class _Lines:
    """A file of log lines: one that cannot be written, for a full disk or a closed pipe, is lost and ends nothing."""

    file: TextIO

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self.file.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.file.flush()


def configure_logging(level: str) -> None:
    """Sends structured lines to stderr: coloured for a terminal, JSON for a machine."""
    terminal = sys.stderr.isatty()
    # Local variables stay out of tracebacks: prompts are among them.
    traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *([] if terminal else [structlog.processors.ExceptionRenderer(traceback)]),
            console if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lines(sys.stderr))),
    )
