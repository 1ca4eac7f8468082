"""Photos of a sitter: each is examined before anything is trained on it, and kept as a plain PNG without its metadata.

A photo comes from anybody: only three formats are opened, the pixels are counted before they are decoded, and one is
decoded at a time and in memory at a time.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO

from PIL import Image, ImageFilter, ImageOps, ImageStat

from api.domain.archives import open_archive
from api.errors import InvalidRequest
from api.store.disk import told

FORMATS = ("JPEG", "PNG", "WEBP")
LEAST, MOST = 3, 20  # photos of a training
MOST_FILES = 100  # that are looked at for them
MOST_BYTES = 20_000_000
MOST_PIXELS = 13_000_000  # that are decoded at once: those of a phone, in 52 MB
JPEG_SCALES = (8, 4, 2, 1)  # at which a JPEG may be decoded, one part of
JPEGS = {"JPEG", "MPO"}  # the second has further pictures behind the first, as phones add them
LEAST_SIDE = 256  # pixels
LONGEST = 2  # times the shorter side that is kept of the longer one
KEPT_SIDE = 1024  # pixels of the shorter side: no base learns from more
SHARP = 6.0  # the spread of second derivatives, in levels, at SHARP_SIDE; less is a blur
SHARP_SIDE = 256
NEAR = 12  # bits of 256 in which the fingerprints of two near duplicates differ at most
FINGERPRINT_SIDE = 16
TOLD = 10  # reasons in an answer
NAME_LETTERS = 100
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


@dataclass(frozen=True)
class Kept:
    """A photo that is good to train on, as a PNG in a file of its own, and the SHA-256 of its pixels."""

    file: Path
    sha256: str


@dataclass(frozen=True)
class Chosen:
    """The photos that are good to train on, and what was found of every file, by its name: why not, or None."""

    photos: Sequence[Kept]
    verdicts: Sequence[tuple[str, str | None]]

    def require_enough(self) -> None:
        """Raises InvalidRequest when fewer than LEAST photos are good, with the reasons."""
        require_enough(len(self.photos), self.verdicts)


def require_enough(good: int, verdicts: Iterable[tuple[str, str | None]] = ()) -> None:
    """Raises InvalidRequest when fewer than LEAST photos are good, with the reasons, by name, that are not None."""
    if good >= LEAST:
        return
    counted = {0: "no picture is", 1: "1 picture is"}.get(good, f"{good} pictures are")
    reasons = [f"{name}: {reason}" for name, reason in verdicts if reason is not None]
    why = "; ".join(reasons[:TOLD]) + ("; …" if len(reasons) > TOLD else "")
    raise InvalidRequest(
        f"{counted} good, {LEAST} are the least{f' ({why})' if why else ''}",
        "Add clear, different pictures of one person: JPEG, PNG or WebP.",
    )


def choose(files: Iterable[tuple[str, bytes]], folder: Path) -> Chosen:
    """Returns the good photos of files with names, MOST of them, as files in `folder`; one at a time is in memory.

    Each is named by its place in `verdicts`, as in `07.png`.

    Raises:
        StorageFull, StorageUnavailable: one cannot be written.
    """
    names, good, verdicts = list[str](), list[Kept](), list[tuple[str, str | None]]()

    def contents() -> Iterator[bytes]:
        for name, content in files:
            names.append(_shown(name))
            yield content

    for verdict in examine(contents()):
        enough = verdict.photo is not None and len(good) == MOST
        if verdict.photo is not None and not enough:
            file = folder / f"{len(verdicts):02}.png"
            with told(folder):
                file.write_bytes(verdict.photo.png)
            good.append(Kept(file, verdict.photo.sha256))
        verdicts.append((names[-1], f"{MOST} pictures are enough" if enough else verdict.reason))
    return Chosen(good, verdicts)


def _shown(name: str) -> str:
    """Returns what a file is called, without its folders, as people can read it."""
    plain = "".join(letter if letter.isprintable() else "�" for letter in name.replace("\\", "/").rsplit("/", 1)[-1])
    return plain[:NAME_LETTERS] or "?"


def in_archive(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the content of each file in a ZIP; of one that is too large for a photo, its beginning.

    Raises:
        InvalidRequest: it is no ZIP that could be read, holds too many files, or one that lies outside of it.
    """
    with open_archive(file) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _is_litter(entry.filename)]
        if len(entries) > MOST_FILES:
            raise InvalidRequest(f"the archive holds {len(entries)} files", f"{MOST} pictures are enough.")
        for entry in entries:
            if entry.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", entry.filename):
                raise InvalidRequest("the archive holds a file that lies outside of it", "Pack the pictures anew.")
            with archive.open(entry) as opened:
                content = opened.read(MOST_BYTES + 1)
            yield entry.filename, content


def _is_litter(name: str) -> bool:
    """Tells what file managers put into archives besides."""
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] in ("Thumbs.db", "desktop.ini")


def examine(photos: Iterable[bytes], known: Sequence[Photo] = ()) -> Iterator[Verdict]:
    """Yields a verdict on each photo, before it takes the next. Of those that are alike the first is good.

    What is like one of those that are `known` to be good, whose pixels nobody needs, is not.
    """
    good = list(known)
    for content in photos:
        verdict = _examine_one(content)
        if verdict.photo is not None and (twin := _like(verdict.photo, good)):
            verdict = Verdict(None, twin)
        if verdict.photo is not None:
            good.append(replace(verdict.photo, png=b""))
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
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):  # a square of it is learned
        middle = (LONGEST * min(width, height), height) if width > height else (width, LONGEST * min(width, height))
        image = ImageOps.fit(image, middle, centering=(0.5, 0.35))
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
