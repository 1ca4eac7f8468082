"""Charts as the pages draw them: numbers that the templates put into SVG, and words for those who hear them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from api.wire.admin import UsageRow

ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Column:
    """One column: its place from 0, its height in percent of the chart, and what it stands for."""

    x: int
    height: float
    label: str
    value: float


@dataclass(frozen=True)
class Columns:
    """A chart of columns: the number at its top, and the columns from left to right."""

    top: float
    columns: Sequence[Column]

    @property
    def labels(self) -> list[str]:
        """The first label, the one in the middle, and the last."""
        names = [column.label for column in self.columns]
        return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


def columns(values: Sequence[tuple[str, float]]) -> Columns:
    """Returns the chart of at least one (label, value); no value is below 0."""
    top = round_up(max(value for _, value in values))
    return Columns(
        top, [Column(x, round(100 * value / top, 2), label, value) for x, (label, value) in enumerate(values)]
    )


def round_up(value: float) -> float:
    """Returns a round number that is not below `value`, nor far above it, as 7, 15, 25 or 400."""
    if value <= 10:
        return max(1.0, ceil(value))
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in ROUND if step * power >= value)


def share(rows: Sequence[UsageRow], measure: str, most: int) -> list[tuple[UsageRow, float]]:
    """Returns up to `most` rows, the largest first, each with its percentage of the largest."""
    ordered = sorted(rows, key=lambda row: float(getattr(row, measure)), reverse=True)[:most]
    largest = max((float(getattr(row, measure)) for row in ordered), default=0.0) or 1.0
    return [(row, round(100 * float(getattr(row, measure)) / largest, 2)) for row in ordered]
