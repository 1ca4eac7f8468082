"""Whose model draws, and how exactly, when thousands of rows of many users share forwards over a tiny base."""

from collections.abc import Iterator

from api.engine.batch import Batch
from bench.figures import Figure, at_most
from tests import canary

ROWS = 10_000


def figures() -> Iterator[Figure]:
    """Yields how many rows were drawn with another user's model, and the largest difference to a row drawn alone."""
    batch = Batch(canary.MOST_ROWS)
    try:
        seen = canary.watch(canary.crowded(), batch, ROWS, seed=1)
    finally:
        batch.close()
    yield at_most("crossovers", seen.crossovers, f"of {ROWS} rows", 0)
    yield at_most("solo_max_error", seen.worst, "of latents, float32", 1e-3)
    yield Figure("the nearest other user", seen.nearest_others, "of latents")
