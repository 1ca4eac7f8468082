"""A grid as its page shows it: a label for each column and row, and how far each cell is."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.config import DEFAULT_USER
from api.domain import history
from api.domain.grids import Grid
from api.domain.history import ENDED, Seen
from api.domain.library import readable
from api.errors import NotFound
from api.routes.jobs import describe
from api.routes.pages.plans import SUGGESTED
from api.routes.pages.visitor import Visitor
from api.wire.jobs import Job
from api.wiring import Service

Names = Mapping[str, str]
"""Sitters' names, by what names them in a form."""


@dataclass(frozen=True)
class Cell:
    """A cell: its job, its newest preview as a `data:` address, and its size in pixels."""

    job: Job
    preview: str | None
    width: int
    height: int

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.job.status in ENDED


@dataclass(frozen=True)
class Table:
    """A grid with everything that is shown of it. An empty label is of what was left out."""

    grid: Grid
    prompt: str | None
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    seconds: float | None  # until all of it is done

    @property
    def done(self) -> int:
        """How many of its pictures there are."""
        return sum(bool(cell.job.images) for cell in self.cells.values())

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to any of them."""
        return all(cell.ended for cell in self.cells.values())

    @property
    def size(self) -> tuple[int, int]:
        """Pixels that every picture of it fits in."""
        return max(cell.width for cell in self.cells.values()), max(cell.height for cell in self.cells.values())

    def file_at(self, column: int, row: int) -> str | None:
        """Returns what the file of a cell's picture is called."""
        seen = self.grid.cells.get((column, row))
        return seen.images[0].image_url if seen and seen.images else None


async def table(service: Service, visitor: Visitor, grid: Grid, names: Names) -> Table:
    """Returns a grid to be shown. Raises NotFound when it varies what nobody knows."""
    if grid.x not in SUGGESTED or grid.y not in SUGGESTED.keys() | {""}:
        raise NotFound("there is no such grid")
    heads = {column: seen for (column, _), seen in grid.cells.items()}
    sides = {row: seen for (_, row), seen in grid.cells.items()}

    def label(axis: str, seen: Seen | None) -> str:
        return _label(service, visitor, names, axis, seen) if axis and seen else ""

    waiting = [seen for seen in grid.cells.values() if seen.job.status not in ENDED]
    last = max(waiting, key=lambda seen: (seen.job.status == "queued", seen.job.start_tag, seen.job.id), default=None)
    seen = next(iter(grid.cells.values()))
    return Table(
        grid,
        None if "prompt" in (grid.x, grid.y) else _prompt(service, visitor, seen),
        [label(grid.x, heads.get(column)) for column in grid.columns],
        [label(grid.y, sides.get(row)) for row in grid.rows],
        {at: await _cell(service, visitor, seen) for at, seen in grid.cells.items()},
        (await history.look(service.database, last.job)).eta_seconds if last else None,
    )


async def _cell(service: Service, visitor: Visitor, seen: Seen) -> Cell:
    jpeg = None
    if seen.job.status == "running" and seen.job.preview_step:
        jpeg = await history.preview(service.database, seen.job.id)
    preview = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None
    asked = seen.job.parameters
    return Cell(describe(seen, service, visitor.caller), preview, asked.get("width", 512), asked.get("height", 512))


def _prompt(service: Service, visitor: Visitor, seen: Seen) -> str | None:
    job = seen.job
    return readable(service.vault, visitor.caller, job.user_id, job.sensitive, job.description)


def _label(service: Service, visitor: Visitor, names: Names, axis: str, seen: Seen) -> str:
    job, asked = seen.job, seen.job.parameters
    match axis:
        case "who":
            model = asked.get("model") or DEFAULT_USER
            return names.get(f"{job.user_id}/{model}", job.user_id if model == DEFAULT_USER else model).title()
        case "shape":
            return f"{asked.get('width')} × {asked.get('height')}"
        case "prompt":
            return _prompt(service, visitor, seen) or ""
        case "negative_prompt":
            return (
                readable(service.vault, visitor.caller, job.user_id, job.sensitive, job.negative_prompt or "") or ""
                if job.negative_prompt
                else ""
            )
        case _:
            value = asked.get(axis)
            return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
