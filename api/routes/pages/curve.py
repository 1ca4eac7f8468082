"""The loss of a training as a line to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, MARGIN = 600, 160, 8  # of the drawing, in its own units


@dataclass(frozen=True)
class Curve:
    """The points of an SVG polyline, as wide as all steps of the training, and what it begins and ends with."""

    points: str
    first: float
    last: float
    step: int

    width: int = WIDTH
    height: int = HEIGHT


def curve(losses: Sequence[tuple[int, float]], steps: int) -> Curve | None:
    """Returns the curve of (step, loss) of a training of so many steps; None before there are two."""
    if len(losses) < 2:
        return None
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    down = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)
    across = WIDTH / max(steps, losses[-1][0])
    points = " ".join(f"{step * across:.1f},{MARGIN + (high - loss) * down:.1f}" for step, loss in losses)
    return Curve(points, losses[0][1], losses[-1][1], losses[-1][0])
