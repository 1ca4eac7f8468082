"""Waiting for what nobody tells of."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0  # until what never happens fails a test, on a machine that is busy
LOOK_SECONDS = 0.005


def until(is_so: Callable[[], bool]) -> None:
    """Returns once it is so. Fails when it never is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(LOOK_SECONDS)
