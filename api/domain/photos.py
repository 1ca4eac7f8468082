"""Photos of a sitter: each is examined before anything is trained on it, and kept as a plain PNG without its metadata.

A photo comes from anybody: only three formats are opened, the pixels are counted before they are decoded, and one is
decoded at a time.
"""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageFilter, ImageOps, ImageStat

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_BYTES = 20_000_000
MOST_PIXELS = 13_000_000  # that are decoded at once: those of a phone, in 52 MB
JPEG_SCALES = (8, 4, 2, 1)  # at which a JPEG may be decoded, one part of
JPEGS = {"JPEG", "MPO"}  # the second has further pictures behind the first, as phones add them
LEAST_SIDE = 256  # pixels
KEPT_SIDE = 1024  # pixels of the shorter side: no base learns from more
SHARP = 6.0  # the spread of second derivatives, in levels, at SHARP_SIDE; less is a blur
SHARP_SIDE = 256
NEAR = 12  # bits of 256 in which the fingerprints of two near duplicates differ at most
FINGERPRINT_SIDE = 16
ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4: which side of a photo is up
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Photo:
    """A photo that is good to train on: its pixels as PNG, and what tells it from others."""

    png: bytes
    sha256: str
    fingerprint: int


@dataclass(frozen=True)
class Verdict:
    """What was found of one photo, in its place: the photo, or why it is refused."""

    photo: Photo | None
    reason: str | None = None


def examine(photos: Iterable[bytes]) -> Iterator[Verdict]:
    """Yields a verdict on each photo, before it takes the next. Of those that are alike the first is good."""
    good = list[Photo]()
    for content in photos:
        verdict = _examine_one(content)
        if verdict.photo is not None and (twin := _like(verdict.photo, good)):
            verdict = Verdict(None, twin)
        if verdict.photo is not None:
            good.append(verdict.photo)
        yield verdict


def _examine_one(content: bytes) -> Verdict:
    try:
        image = _decode(content)
    except Image.DecompressionBombError:
        return Verdict(None, "it has too many pixels")
    except Exception:
        return Verdict(None, "it is no whole JPEG, PNG or WebP")  # whatever the decoder stumbled on
    if isinstance(image, str):
        return Verdict(None, image)
    if _spread(image) < SHARP:
        return Verdict(None, "it is blurred")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return Verdict(Photo(buffer.getvalue(), hashlib.sha256(image.tobytes()).hexdigest(), _fingerprint(image)))


def _decode(content: bytes) -> Image.Image | str:
    """Returns the picture upright, without metadata, KEPT_SIDE at most; or why it is refused."""
    if not content:
        return "it is empty"
    if len(content) > MOST_BYTES:
        return f"it has more than {MOST_BYTES // 1_000_000} MB"
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        width, height = opened.size
        # One that is decoded row by row is decoded smaller at once; a progressive one is kept whole meanwhile.
        by_rows = opened.format in JPEGS and not opened.info.get("progressive")
        step = next(step for step in JPEG_SCALES if step == 1 or (by_rows and min(width, height) >= step * KEPT_SIDE))
        if width * height / step**2 > MOST_PIXELS:
            return f"it has {width} × {height} pixels, which is too many"
        if min(width, height) < LEAST_SIDE:
            return f"it has {width} × {height} pixels; {LEAST_SIDE} on each side are the least"
        if opened.format not in JPEGS and getattr(opened, "n_frames", 1) > 1:
            return "it is animated"
        opened.draft("RGB", (width // step, height // step))
        turned = TURNS.get(opened.getexif().get(ORIENTATION, 1))
        scale = min(1.0, KEPT_SIDE / min(width, height))
        opened.thumbnail((math.ceil(width * scale), math.ceil(height * scale)), reducing_gap=2.0)  # in place
        image = opened.convert("RGB")
    if turned is not None:
        image = image.transpose(turned)
    return Image.frombytes("RGB", image.size, image.tobytes())  # nothing but pixels


def _spread(image: Image.Image) -> float:
    """Returns how sharp the picture is: the standard deviation of its Laplacian, in levels."""
    small = ImageOps.fit(image.convert("L"), (SHARP_SIDE, SHARP_SIDE))
    kernel = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
    inside = small.filter(kernel).crop((1, 1, SHARP_SIDE - 1, SHARP_SIDE - 1))
    return float(ImageStat.Stat(inside).stddev[0])


def _fingerprint(image: Image.Image) -> int:
    """Returns which of the picture's cells are brighter than their right neighbours (dHash), as bits."""
    side = FINGERPRINT_SIDE
    cells = image.convert("L").resize((side + 1, side), Image.Resampling.BOX).tobytes()
    rows = [cells[first : first + side + 1] for first in range(0, len(cells), side + 1)]
    return int("".join("1" if right > left else "0" for row in rows for left, right in pairwise(row)), 2)


def _like(photo: Photo, others: Sequence[Photo]) -> str | None:
    """Returns why the photo is one of the others again, or None."""
    for other in others:
        if photo.sha256 == other.sha256:
            return "it is the same as another one"
        if (photo.fingerprint ^ other.fingerprint).bit_count() <= NEAR:
            return "it is nearly the same as another one"
    return None
