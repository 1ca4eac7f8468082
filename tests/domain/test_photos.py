import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from api.config import ROOT
from api.domain import photos
from api.domain.photos import KEPT_SIDE, LEAST_SIDE, Verdict

SIDE = 400


def picture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Blocks of colour, another one for each seed."""
    cells = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def stored(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def examine(contents: list[bytes]) -> list[Verdict]:
    return list(photos.examine(contents))


def reason(content: bytes) -> str | None:
    [verdict] = examine([content])
    assert (verdict.photo is None) == (verdict.reason is not None)
    return verdict.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_good_photos_are_kept_as_plain_pngs(kind: str) -> None:
    [verdict] = examine([stored(picture(), kind)])
    assert verdict.photo is not None
    with Image.open(io.BytesIO(verdict.photo.png)) as kept:
        assert (kept.format, kept.mode, kept.size, kept.info) == ("PNG", "RGB", (SIDE, SIDE), {})


def test_metadata_goes_and_what_it_says_of_the_side_that_is_up_is_done() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010E] = "a secret place"
    [verdict] = examine([stored(picture(width=600), "JPEG", exif=exif)])
    assert verdict.photo is not None
    assert b"secret" not in verdict.photo.png
    assert Image.open(io.BytesIO(verdict.photo.png)).size == (SIDE, 600)


def test_large_photos_are_kept_smaller() -> None:
    [verdict] = examine([stored(picture(width=5000, height=4000), "JPEG")])
    assert verdict.photo is not None
    assert min(Image.open(io.BytesIO(verdict.photo.png)).size) == KEPT_SIDE


def bomb() -> bytes:
    info = PngInfo()
    info.add_text("Comment", "x" * 200_000_000, zip=True)
    return stored(picture(), pnginfo=info)


BAD: dict[str, Callable[[], bytes]] = {
    "it is empty": lambda: b"",
    "it is no whole JPEG, PNG or WebP": lambda: stored(picture(), "GIF"),
    "no whole": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "no whole JPEG": lambda: b"SIMPLE  =                    T" + b" " * 5000,  # FITS
    "whole": lambda: stored(picture(), "PNG")[:600],
    "whole JPEG": lambda: stored(picture(), "JPEG")[:300],
    "JPEG, PNG or WebP": bomb,
    "it has too many pixels": lambda: stored(Image.new("1", (20_000, 20_000)), "PNG"),
    "7000 × 4000 pixels, which is too many": lambda: stored(Image.new("L", (7000, 4000)), "JPEG", progressive=True),
    f"{LEAST_SIDE - 1} × {SIDE} pixels": lambda: stored(picture(width=LEAST_SIDE - 1)),
    "it is animated": lambda: stored(picture(), "WEBP", save_all=True, append_images=[picture(1)]),
    "it is blurred": lambda: stored(picture().filter(ImageFilter.GaussianBlur(40))),
    "more than 20 MB": lambda: stored(picture()) + bytes(20_000_000),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_photos_are_told_why(expected: str) -> None:
    assert expected in (reason(BAD[expected]()) or "")


def test_what_is_named_otherwise_than_it_is_counts_as_what_it_is() -> None:
    assert reason(b"\xff\xd8\xff\xe0" + stored(picture(), "GIF")) is not None
    assert reason(stored(picture(), "JPEG")) is None


def test_photos_that_are_alike_count_once() -> None:
    one, other = picture(1), picture(2)
    verdicts = examine(
        [
            stored(one),
            stored(other),
            stored(one),
            stored(one, "JPEG", quality=60),
            stored(other.crop((2, 2, SIDE - 2, SIDE - 2))),
        ]
    )
    assert [verdict.photo is not None for verdict in verdicts] == [True, True, False, False, False]
    assert verdicts[2].reason == "it is the same as another one"
    assert verdicts[3].reason == verdicts[4].reason == "it is nearly the same as another one"


@pytest.mark.parametrize("sitter", ["ada", "bo", "chi"])
def test_the_bundled_sitters_photos_are_good(sitter: str) -> None:
    files: list[Path] = sorted((ROOT / "models/sitters" / sitter / "pictures").iterdir())
    assert [verdict.reason for verdict in examine([file.read_bytes() for file in files])] == [None] * len(files)


def test_mutated_photos_never_raise() -> None:
    chance = np.random.default_rng(7)
    whole = [stored(picture(), kind) for kind in ("PNG", "JPEG", "WEBP")]
    for number in range(100):
        mutated = np.frombuffer(whole[number % 3], np.uint8).copy()
        places = chance.integers(0, len(mutated), 8)
        mutated[places] = chance.integers(0, 256, 8)
        reason(mutated[: chance.integers(1, len(mutated) + 1)].tobytes())


MEASURE = """
import resource, sys
from pathlib import Path
from api.domain.photos import examine
list(examine([Path(sys.argv[1]).read_bytes()]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(examine([Path(sys.argv[2]).read_bytes()]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    ("kind", "width", "height"),
    [("JPEG", 8000, 6000), ("PNG", 4032, 3024), ("JPEG", 4000, 12500), ("WEBP", 9000, 9000)],
)
def test_no_photo_takes_much_memory(tmp_path: Path, kind: str, width: int, height: int) -> None:
    usual, large = tmp_path / "usual", tmp_path / "large"
    usual.write_bytes(stored(picture()))
    large.write_bytes(stored(picture(width=width, height=height), kind))
    ran = subprocess.run([sys.executable, "-c", MEASURE, usual, large], capture_output=True, check=True, cwd=ROOT)
    assert int(ran.stdout) < 80_000_000  # the photo's file, its pixels, and what is kept
