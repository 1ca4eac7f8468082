"""Grids: one drawing with two of its values varied, as a job for each cell.

Nothing else is kept of a grid than its jobs. Their Idempotency-Keys say where they stand in it and what varies there,
and their ids follow the grid's, whose digits tell the time as theirs do.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sqlalchemy import select

from api.domain import history
from api.domain.accounts import Caller
from api.domain.history import Seen
from api.errors import NotFound
from api.store.database import Database
from api.store.tables import Request, new_id

MOST_CELLS = 36
TAG = "grid:"
FRESH_MS = 3_600_000  # for which an id may wait for its jobs: where they lie in the table is known by it
CLOCK_DIGITS = 12  # of an id: its milliseconds


@dataclass(frozen=True)
class Place:
    """Where a cell stands: `x` names what varies from column to column, `y` what does from row to row, if anything."""

    x: str
    y: str
    column: int
    row: int


@dataclass(frozen=True)
class Grid:
    """A grid and those of its cells that were accepted."""

    id: str
    x: str
    y: str
    cells: Mapping[tuple[int, int], Seen]  # by column and row

    @property
    def columns(self) -> range:
        """The numbers of its columns."""
        return range(1 + max(column for column, _ in self.cells))

    @property
    def rows(self) -> range:
        """The numbers of its rows."""
        return range(1 + max(row for _, row in self.cells))


def is_cell(job: Request) -> bool:
    """Tells whether a job is a cell of a grid."""
    return (job.idempotency_key or "").startswith(TAG)


def new_grid(key: str | None = None, said: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns the id of a new grid; the same for the same `key` and what was `said` with it.

    A key is such an id, which a form was handed out with; one of too long ago is none. Who goes back and says
    something else has another grid, and the first one stays.
    """
    fresh = new_id()
    recent = f"{int(fresh[:CLOCK_DIGITS], 16) - FRESH_MS:0{CLOCK_DIGITS}x}"
    if key is None or not recent < key[:CLOCK_DIGITS] <= fresh[:CLOCK_DIGITS]:
        return fresh
    digest = hashlib.sha256(repr((key, sorted(said.items()))).encode()).hexdigest()
    return key[:CLOCK_DIGITS] + digest[: len(key) - CLOCK_DIGITS]


def key_of(grid_id: str, place: Place) -> str:
    """Returns the Idempotency-Key of a cell."""
    return f"{TAG}{grid_id}:{place.x}:{place.y}:{place.column}:{place.row}"


async def find(database: Database, caller: Caller, grid_id: str) -> Grid:
    """Returns the grid.

    Raises:
        NotFound: there is none of that id that the caller may see.
    """
    if not re.fullmatch("[0-9a-f]{28}", grid_id):
        raise NotFound("there is no such grid")
    prefix = f"{TAG}{grid_id}:"
    first, last = (int(grid_id[:CLOCK_DIGITS], 16) + later for later in (0, 2 * FRESH_MS))
    wanted = select(Request).where(
        Request.id >= f"{first:0{CLOCK_DIGITS}x}",
        Request.id < f"{last:0{CLOCK_DIGITS}x}",
        Request.idempotency_key.startswith(prefix),
    )
    if (owner := caller.owner_filter(None)) is not None:
        wanted = wanted.where(Request.user_id == owner)
    async with database.reading() as session:
        found = await history.with_images(session, list(await session.scalars(wanted)))
    cells = {place: seen for seen in found if (place := _place(seen.job.idempotency_key or ""))}
    if not cells:
        raise NotFound("there is no such grid")
    some = next(iter(cells))
    grid = Grid(grid_id, some.x, some.y, {(place.column, place.row): seen for place, seen in cells.items()})
    if len(grid.columns) * len(grid.rows) > MOST_CELLS:  # by keys that somebody thought of, and as large as they like
        raise NotFound("there is no such grid")
    return grid


def _place(key: str) -> Place | None:
    """Returns where a cell stands; None by a key that somebody thought of."""
    match = re.fullmatch(rf"{TAG}[0-9a-f]{{28}}:(\w*):(\w*):(\d\d?):(\d\d?)", key)
    return match and Place(match[1], match[2], int(match[3]), int(match[4]))
