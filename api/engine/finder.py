"""Finding bases, once however many ask. What was wrong with a model is remembered for a while. Free of torch."""

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from api.config import ModelSource
from api.errors import ModelUnavailable

if TYPE_CHECKING:
    from api.engine.sources import FoundBase

FAILURE_MEMORY_SECONDS = 30.0


@dataclass(frozen=True)
class _Failure:
    detail: str
    hint: str
    until: float


class Finder:
    """Knows where bases are on this disk, and which models do not load.

    Args:
        find: finds a base, and raises ModelUnavailable when there is none; it may ask a hub, and take minutes.
    """

    def __init__(self, find: "Callable[[ModelSource], FoundBase]") -> None:
        self._find = find
        self._known: dict[Hashable, FoundBase | _Failure] = {}
        self._finding: dict[ModelSource, threading.Lock] = {}

    def find(self, source: ModelSource) -> "FoundBase":
        """Returns where the base of `source` is; many callers at once cause one search.

        Raises:
            ModelUnavailable: there is none, or the model failed less than 30 seconds ago.
        """
        base = source.without_lora()
        with self._finding.setdefault(base, threading.Lock()):
            self.recall(source)
            if found := self.recall(base):
                return found
            with self.remembering_failure(base):
                found = self._known[base] = self._find(base)
            return found

    @contextmanager
    def remembering_failure(self, model: Hashable) -> Iterator[None]:
        """Remembers that `model` was unavailable in the block, so that the next request is told at once."""
        try:
            yield
        except ModelUnavailable as error:
            # The words alone: an exception holds the frames that it passed, and the tensors in them.
            self._known[model] = _Failure(error.detail, error.hint, time.monotonic() + FAILURE_MEMORY_SECONDS)
            raise

    def clear(self) -> None:
        """Forgets every base and every failure."""
        self._known.clear()

    def recall(self, model: Hashable) -> "FoundBase | None":
        """Returns where a base is, if that is known. Raises ModelUnavailable for what failed a short while ago."""
        known = self._known.get(model)
        if not isinstance(known, _Failure):
            return known
        if time.monotonic() < known.until:
            raise ModelUnavailable(known.detail, known.hint)
        return None
