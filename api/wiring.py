"""Makes every object of the service once, and hands each only what it needs."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from api.config import Settings
from api.model_service import ModelService
from api.store.files import PictureFolder


@dataclass(frozen=True)
class Service:
    """What the routes and the CLI are given."""

    settings: Settings
    models: ModelService
    pictures: PictureFolder


@contextmanager
def open_service(settings: Settings) -> Iterator[Service]:
    """Opens the service inside the block; torch is imported in the background meanwhile."""
    _configure_logging(settings.log_level)
    models = ModelService(settings)
    try:
        yield Service(settings, models, PictureFolder(settings.output_dir))
    finally:
        models.close()


def _configure_logging(level: str) -> None:
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
