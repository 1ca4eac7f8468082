"""How many rows a forward should have: the fewest at which a row costs nearly as little as it ever does.

More rows in a forward make a row cheaper while they share what a call costs and what the weights cost to read; beyond
that they only make the step longer, for everybody in it. Where that knee lies depends on the model, the size of the
pictures and the machine, so the forwards themselves tell. Free of torch.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

NEARLY = 1.05  # times the cheapest row
TRIES = 3  # forwards of a size before it is judged, by the quickest: whatever else the machine does only ever adds
KEPT = 16  # forwards of a size that are remembered
AGE = 2000  # forwards of one kind after which all is measured anew


@dataclass
class _Costs:
    """Seconds a row by size, of the forwards of one kind."""

    forwards: int = 0
    by_size: dict[int, deque[float]] = field(default_factory=dict)


class Knee:
    """Learns from forwards how many rows the next one should have.

    Args:
        most_rows: of any forward.
    """

    def __init__(self, most_rows: int) -> None:
        self._sizes = [most_rows]
        while self._sizes[-1] > 2:
            self._sizes.append(max(2, self._sizes[-1] // 2))
        self._costs: WeakKeyDictionary[object, dict[Hashable, _Costs]] = WeakKeyDictionary()

    def note(self, model: object, shape: Hashable, rows: int, seconds: float) -> None:
        """Remembers a forward."""
        costs = self._costs.setdefault(model, {}).setdefault(shape, _Costs())
        costs.forwards += 1
        if costs.forwards > AGE:
            costs.forwards, costs.by_size = 0, {}
        size = min((size for size in self._sizes if size >= rows), default=self._sizes[0])
        costs.by_size.setdefault(size, deque(maxlen=KEPT)).append(seconds / rows)

    def rows(self, model: object, shape: Hashable, least: int = 1) -> int:
        """Returns how many rows a forward of that model and shape should have at most.

        Args:
            model: what is called.
            shape: of its rows.
            least: rows that the next forward has in any case; smaller ones cannot be tried now.
        """
        costs = self._costs.get(model, {}).get(shape, _Costs()).by_size
        sizes = [size for size in self._sizes if size >= least]
        for size in sizes:
            if len(costs.get(size, ())) < TRIES:
                return size  # not known yet, so that it is tried as soon as so many rows are there
        cheapest = min((min(costs[size]) for size in sizes), default=0.0)
        return min((size for size in sizes if min(costs[size]) <= NEARLY * cheapest), default=least)
