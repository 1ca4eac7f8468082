"""Judging a sitter's samples before they are published: is it them, as asked, and is the class still what it was?

Likeness and obedience are told by what an attribute reader sees. Where a base has none they stay unknown, and the
variety of the samples alone is judged.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from api.engine.reader import AttributeReader

LEAST_LIKENESS = 0.75
LEAST_OBEDIENCE = 0.75
LEAST_CLASS_KEPT = 0.6
LEAST_VARIETY = 0.4
THUMBNAIL = 64  # pixels


@dataclass(frozen=True)
class Scores:
    """What samples of a sitter show, each from 0 to 1 (variety may be more), None where nobody can tell.

    Attributes:
        likeness: share of the sitter's features that the samples show.
        obedience: share of what the prompts ask for that they show, where the base shows it.
        class_kept: share of features that pictures of the class have still, of the same seeds.
        variety: how much the samples differ from each other, over how much the base's do.
    """

    likeness: float | None
    obedience: float | None
    class_kept: float | None
    variety: float

    @property
    def total(self) -> float:
        """What one of several candidates is chosen by."""
        known = (self.likeness, self.obedience, self.class_kept)
        return sum(score for score in known if score is not None) + min(1.0, self.variety)

    def refusal(self) -> str | None:
        """Returns why this is not to be published and what to do, or None."""
        if self.variety < LEAST_VARIETY:
            return "All samples look alike: train fewer steps, or with more different pictures."
        if self.likeness is not None and self.likeness < LEAST_LIKENESS:
            return "The samples do not look like the pictures: train more steps, or with more and clearer pictures."
        if self.obedience is not None and self.obedience < LEAST_OBEDIENCE:
            return "The samples do not show what was asked for: train fewer steps."
        if self.class_kept is not None and self.class_kept < LEAST_CLASS_KEPT:
            return "Everybody looks like the sitter: train fewer steps."
        return None


def judge(
    reader: AttributeReader | None,
    photos: Sequence[Image.Image],
    samples: Sequence[Image.Image],
    of_base: Sequence[Image.Image],
    of_class: Sequence[Image.Image],
) -> Scores:
    """Returns the scores of a candidate.

    Args:
        reader: tells features; None where the base has none.
        photos: of the sitter.
        samples: the candidate's pictures of the sitter.
        of_base: the base's pictures of the class, for the same scenes and seeds.
        of_class: the candidate's pictures of the class, for the first of those scenes and seeds.
    """
    variety = _spread(samples) / max(1e-6, _spread(of_base))
    if reader is None:
        return Scores(None, None, None, variety)
    seen, base, after = reader.read(samples), reader.read(of_base), reader.read(of_class)
    usual = [Counter(photo[key] for photo in reader.read(photos)).most_common(1)[0][0] for key in reader.identity]
    sitter = dict(zip(reader.identity, usual, strict=True))
    likeness = _share([sample[key] == sitter[key] for sample in seen for key in reader.identity])
    pairs = list(zip(seen, base, strict=True))
    obedience = _share([sample[key] == plain[key] for sample, plain in pairs for key in reader.scene])
    kept = [one[key] == plain[key] for one, plain in zip(after, base, strict=False) for key in reader.identity]
    return Scores(likeness, obedience, _share(kept), variety)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / max(1, len(hits))


def _spread(pictures: Sequence[Image.Image]) -> float:
    """Returns the mean difference of two of the pictures, in levels."""
    small = [np.asarray(picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), np.float32) for picture in pictures]
    return float(np.mean([np.abs(one - other).mean() for one, other in combinations(small, 2)]))
