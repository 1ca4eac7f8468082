"""What a grid's form asks for: which two values vary, and the drawing of each cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.domain.grids import MOST_CELLS, TAG, Place
from api.errors import InvalidRequest
from api.routes.pages.asked import SAMPLERS, SHAPES, order_of
from api.routes.pages.sitters import Sitter
from api.wire.jobs import JobRequest

SUGGESTED = {
    "num_inference_steps": "10, 20, 30, 50",
    "guidance_scale": "3, 5, 7.5, 10",
    "seed": "1, 2, 3, 4",
    "scheduler": ", ".join(SAMPLERS),
    "who": "",  # everybody who can be drawn
    "shape": ", ".join(SHAPES),
    "negative_prompt": "-\nblurry\nblurry, sunglasses",
    "prompt": "photo of sks person as a knight\nphoto of sks person as a wizard",
}
"""What may vary, by its name in the form, and values of it to begin with."""
PROSE = {"negative_prompt", "prompt"}  # has commas of its own: a value a line
NOTHING = "-"  # the value that leaves it out
MAY_BE_NOTHING = {"negative_prompt", "scheduler"}


@dataclass(frozen=True)
class Plan:
    """A grid to be drawn: the values of its columns and rows as the form has them, and each cell's drawing."""

    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    orders: Mapping[Place, JobRequest]


def suggestions(everybody: Sequence[Sitter]) -> dict[str, str]:
    """Returns values to begin with, by what varies."""
    return SUGGESTED | {"who": ", ".join(one.name.title() for one in everybody if one.name)}


def planned(form: Mapping[str, str], everybody: Sequence[Sitter], grid_id: str) -> Plan:
    """Returns what a form asks for; what does not vary is the same in every cell, the seed too.

    Raises:
        InvalidRequest, RequestValidationError: it does not fit.
    """
    x, y = form.get("x", ""), form.get("y", "")
    if x not in SUGGESTED or y not in SUGGESTED.keys() | {""}:
        raise InvalidRequest("say what varies from column to column", "Choose one of the list.")
    if x == y:
        raise InvalidRequest("columns and rows vary the same", "Choose something else for the rows, or nothing.")
    columns = _values(x, form.get("x_values", ""), everybody)
    rows = _values(y, form.get("y_values", ""), everybody) if y else [""]
    if (cells := len(columns) * len(rows)) > MOST_CELLS:
        raise InvalidRequest(f"{cells} pictures are too many, {MOST_CELLS} are the most", "Leave some values out.")
    base = {name: value for name, value in form.items() if name not in ("x", "y", "num_images")}
    base["seed"] = base.get("seed", "").strip() or str(int(grid_id[-8:], 16))
    orders = {
        Place(x, y, column, row): order_of({**base, y: down, x: across}).model_copy(update={"tags": [TAG + grid_id]})
        for row, down in enumerate(rows)
        for column, across in enumerate(columns)
    }
    return Plan(x, y, columns, rows, orders)


def _values(axis: str, text: str, everybody: Sequence[Sitter]) -> list[str]:
    given = [one.strip() for one in text.splitlines()]
    if axis not in PROSE:
        given = [one.strip() for line in given for one in line.split(",")]
    values = dict.fromkeys(_value(axis, one, everybody) for one in given if one)  # each once
    if not values:
        raise InvalidRequest("a side of the grid has no values", "Say them with commas between, texts one a line.")
    return list(values)[: MOST_CELLS + 1]


def _value(axis: str, given: str, everybody: Sequence[Sitter]) -> str:
    """Returns a value as the form of a drawing has it."""
    if given == NOTHING and axis in MAY_BE_NOTHING:
        return ""
    if axis == "who":
        return _sitter(given, everybody)
    return given.lower() if axis in ("shape", "scheduler") else given


def _sitter(given: str, everybody: Sequence[Sitter]) -> str:
    for one in everybody:
        if given.casefold() in (one.name.casefold(), one.value.casefold()) and one.name:
            return one.value
    names = ", ".join(one.name.title() for one in everybody if one.name) or "nobody yet"
    raise InvalidRequest(f"nobody here is called {given[:40]}", f"There is {names}.")
