"""Judging a sitter's samples before they are published: is it them, as asked, and is the class still what it was?

Likeness, obedience and the class are measured by a judge: an attribute reader that was made for the base (`reader`), or
an image encoder that knows any picture (`encoder`). Without one they stay unknown, and the variety of the samples alone
is judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

LEAST_VARIETY = 0.4
THUMBNAIL = 64  # pixels
T = TypeVar("T")


@dataclass(frozen=True)
class Least:
    """What samples must score to be published; each judge has a scale of its own."""

    likeness: float = 0.0
    obedience: float = 0.0
    class_kept: float = 0.0


@dataclass(frozen=True)
class Scores:
    """What samples of a sitter show, each from 0 to 1 (variety may be more), None where nobody can tell.

    Attributes:
        likeness: how much the samples show of the sitter.
        obedience: how much they show of what the prompts ask for, as far as the base shows it.
        class_kept: how much pictures of the class, of the same seeds, are still what they were.
        variety: how much the samples differ from each other, over how much the base's do.
        least: what is asked of the first three.
    """

    likeness: float | None
    obedience: float | None
    class_kept: float | None
    variety: float
    least: Least = Least()

    @property
    def total(self) -> float:
        """What one of several candidates is chosen by."""
        known = (self.likeness, self.obedience, self.class_kept)
        return sum(score for score in known if score is not None) + min(1.0, self.variety)

    def by_name(self) -> dict[str, float | None]:
        """Returns the scores as they are told."""
        return {name: getattr(self, name) for name in ("likeness", "obedience", "class_kept", "variety")}

    def refusal(self) -> str | None:
        """Returns why this is not to be published and what to do, or None."""
        if self.variety < LEAST_VARIETY:
            return "All samples look alike: train fewer steps, or with more different pictures."
        if self.likeness is not None and self.likeness < self.least.likeness:
            return "The samples do not look like the pictures: train more steps, or with more and clearer pictures."
        if self.obedience is not None and self.obedience < self.least.obedience:
            return "The samples do not show what was asked for: train fewer steps."
        if self.class_kept is not None and self.class_kept < self.least.class_kept:
            return "Everybody looks like the sitter: train fewer steps."
        return None


@dataclass(frozen=True)
class Shown:
    """What a candidate is judged by.

    Attributes:
        photos: of the sitter.
        samples: the candidate's pictures of the sitter.
        of_base: the base's pictures of the class, for the same scenes and seeds.
        of_class: the candidate's pictures of the class, for the first of those scenes and seeds.
        prompts: what the base's pictures were asked for by.
    """

    photos: Sequence[Image.Image]
    samples: Sequence[Image.Image]
    of_base: Sequence[Image.Image]
    of_class: Sequence[Image.Image]
    prompts: Sequence[str]


class Run(Protocol):
    """Does what takes a moment of the device, in its turn."""

    def __call__(self, action: Callable[[], T], /) -> T:
        """Returns what `action` returns."""


class Judge(Protocol):
    """Measures how good samples are."""

    @property
    def least(self) -> Least:
        """What samples must score, on this judge's scale."""

    def measure(self, shown: Shown, run: Run) -> tuple[float | None, float | None, float | None]:
        """Returns likeness, obedience and how far the class is kept, each from 0 to 1 or None; see `Scores`."""


def judge(by: Judge | None, shown: Shown, run: Run) -> Scores:
    """Returns the scores of a candidate.

    Args:
        by: measures them; None where nobody can.
        shown: its pictures, and those they are compared with.
        run: does whatever takes a moment.
    """
    variety = _spread(shown.samples) / max(1e-6, _spread(shown.of_base))
    if by is None:
        return Scores(None, None, None, variety)
    return Scores(*by.measure(shown, run), variety, by.least)


def _spread(pictures: Sequence[Image.Image]) -> float:
    """Returns the mean difference of two of the pictures, in levels."""
    small = [np.asarray(picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), np.float32) for picture in pictures]
    return float(np.mean([np.abs(one - other).mean() for one, other in combinations(small, 2)]))
