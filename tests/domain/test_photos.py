"""Photos and archives of them: the good ones are kept, all others are told why, and none does harm."""

import dataclasses
import hashlib
import io
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

from api.config import ROOT
from api.domain import photos
from api.domain.photos import KEPT_SIDE, LEAST_SIDE, MOST, MOST_FILES, ORIENTATION, Verdict
from api.errors import InvalidRequest
from tests.archives import BZIP2, DEFLATED, LOCKED, LZMA, STORED, Entry, crowded, forged, packed, zeros
from tests.memory import forget_peak, measured, peak

SIDE = 400
SCALE = int(os.environ.get("FUZZ_SCALE", "1"))  # of the mutations; `make fuzz` has more
MUTATIONS, ARCHIVES, CHUNKS = (100, 50, 1) if SCALE == 1 else (500 * SCALE, 50 * SCALE, 10)


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


MEASURE = """
import sys
from pathlib import Path
from api.domain.photos import examine
from tests.memory import forget_peak, peak
usual, large = (Path(path).read_bytes() for path in sys.argv[1:])
list(examine([usual]))
before = forget_peak()
list(examine([large]))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("kind", "width", "height"),
    [("JPEG", 8000, 6000), ("PNG", 4032, 3024), ("JPEG", 4000, 12500), ("WEBP", 9000, 9000)],
)
def test_no_photo_takes_much_memory(tmp_path: Path, kind: str, width: int, height: int) -> None:
    usual, large = tmp_path / "usual", tmp_path / "large"
    usual.write_bytes(stored(picture()))
    large.write_bytes(stored(picture(width=width, height=height), kind))
    assert measured(MEASURE, usual, large) < 100_000_000  # its pixels, half as many while it is made smaller, and those


MEASURE_MANY = """
import sys
from pathlib import Path
from api.domain import photos
from tests.domain.test_photos import grainy
from tests.memory import forget_peak, peak
photos.MOST = int(sys.argv[2])
folder = Path(sys.argv[1])
photos.choose([("usual", grainy(0))], folder)
before = forget_peak()
chosen = photos.choose(((str(seed), grainy(seed)) for seed in range(12)), folder)
assert (len(chosen.photos), len(chosen.verdicts)) == (photos.MOST, 12)
print(peak() - before)
"""


def grainy(seed: int) -> bytes:
    """A picture that does not get smaller."""
    noise = np.random.default_rng(seed).integers(0, 255, (KEPT_SIDE, KEPT_SIDE, 3), np.uint8)
    return stored(Image.fromarray(noise), compress_level=0)


@pytest.mark.parametrize("wanted", [2, 12])
def test_one_photo_is_in_memory_at_a_time(tmp_path: Path, wanted: int) -> None:
    """Each is 3 MB of PNG, which comes and is kept, and 4 MB of pixels, a few times over."""
    assert measured(MEASURE_MANY, tmp_path, wanted) < 25_000_000
    assert len(list(tmp_path.iterdir())) == wanted


def whole_photos() -> list[bytes]:
    """A picture in every form that is read, or might be."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "a camera"
    info = PngInfo()
    info.add_text("Comment", "x" * 100, zip=True)
    image, other = (picture(seed, 300, LEAST_SIDE) for seed in range(2))
    deep = Image.fromarray(np.arange(LEAST_SIDE**2, dtype=np.uint16).reshape(LEAST_SIDE, LEAST_SIDE))
    return [
        stored(image, exif=exif, pnginfo=info, icc_profile=b"p" * 200),
        stored(image.convert("RGBA")),
        stored(image.quantize(16), transparency=0, bits=4),
        stored(deep),
        stored(image, save_all=True, append_images=[other]),
        stored(image, "JPEG", exif=exif),
        stored(image, "JPEG", progressive=True, optimize=True, subsampling=0),
        stored(image.convert("CMYK"), "JPEG", comment=b"a comment"),
        stored(image, "MPO", save_all=True, append_images=[other]),
        stored(image, "WEBP", exif=exif, icc_profile=b"p" * 200),
        stored(image.convert("RGBA"), "WEBP", lossless=True),
        stored(image, "WEBP", save_all=True, append_images=[other]),
    ]


EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 20_000, 4_000]


def mutated(whole: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """What a disk, a network or somebody with bad intentions makes of a file."""
    content = bytearray(whole)
    place, length = chance.randrange(len(content)), chance.choice([1, 4, 100, 3000])
    match chance.randrange(8):
        case 0:
            del content[place:]
        case 1:
            del content[place : place + length]
        case 2:
            content[place:place] = content[chance.randrange(len(content)) :][:length]
        case 3:
            other = chance.choice(others)
            content[place:] = other[chance.randrange(len(other)) :]
        case 4 if png := re.findall(rb"(?s)(?=(....)(IHDR|PLTE|tRNS|eXIf|iCCP|zTXt|acTL|fcTL|IDAT|IEND))", whole):
            size, kind = chance.choice(png)
            return _with_another_chunk(whole, size, kind, chance)
        case 5 if heads := [
            found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06[\x06\x07])", whole)
        ]:
            for _ in range(chance.choice([1, 2])):  # in one of a ZIP's headers, or the name behind it
                at = min(chance.choice(heads) + chance.randrange(4, 56), len(content) - 1)
                content[at] = chance.choice([0, 1, 0xFF, chance.randrange(256)])
        case 6:
            value = chance.choice(EXTREMES).to_bytes(4, chance.choice(["big", "little"]))
            at = chance.choice([place, place % 64, place % 700, -(place % 300) - 1])
            content[at : at + 4 or None] = value[chance.choice([0, 2]) :]
        case _:
            for _ in range(chance.choice([0, 1, 8, 64])):
                content[chance.choice([chance.randrange(len(content)), place % 64])] = chance.randrange(256)
    return bytes(content)


def _with_another_chunk(png: bytes, size: bytes, kind: bytes, chance: random.Random) -> bytes:
    """A PNG one of whose chunks holds something else, under a sum that is right."""
    start, length = png.index(size + kind) + 4, int.from_bytes(size, "big")
    chunk = bytearray(png[start : start + 4 + length])
    for _ in range(chance.choice([1, 4])):
        if len(chunk) > 4:
            chunk[chance.randrange(4, len(chunk))] = chance.choice([0, 1, 0xFF, chance.randrange(256)])
    summed = bytes(chunk) + zlib.crc32(chunk).to_bytes(4, "big")
    again = chance.choice([1, 1, 2, 50])
    return png[: start - 4] + (size + summed) * again + png[start + len(chunk) + 4 :]


def check_photo(content: bytes) -> bool:
    """Checks whatever is made of it, and returns whether it is good."""
    [verdict] = photos.examine([content])
    assert (verdict.photo is None) == (verdict.reason is not None)
    if verdict.photo is None:
        return False
    with Image.open(io.BytesIO(verdict.photo.png)) as kept:
        assert (kept.format, kept.mode, kept.info) == ("PNG", "RGB", {})
        assert LEAST_SIDE / 2 <= min(kept.size) <= KEPT_SIDE
        assert hashlib.sha256(kept.tobytes()).hexdigest() == verdict.photo.sha256
    return True


def whole_archives() -> list[bytes]:
    """Photos packed in every way that is read, or might be."""
    files = [(f"me/{seed}.jpg", stored(picture(seed, LEAST_SIDE, LEAST_SIDE), "JPEG")) for seed in range(3)]
    litter = [("me/", b""), ("me/.DS_Store", b"x"), ("notes.txt", b"x" * 1000)]
    packs = [packed(*files, *litter, method=method) for method in (STORED, DEFLATED, BZIP2, LZMA)]
    entries = [Entry(name.encode(), content, size=len(content)) for name, content in files]
    locked = [dataclasses.replace(entry, flags=LOCKED) for entry in entries]
    return [*packs, forged(*entries), forged(*locked), crowded(50), crowded(5000, told=3)]


def check_archive(content: bytes) -> bool:
    """Checks whatever is made of it, and returns whether it is good."""
    with TemporaryDirectory() as folder:
        try:
            chosen = photos.choose(photos.in_archive(io.BytesIO(content)), Path(folder))
        except InvalidRequest:
            return False
        assert {photo.file for photo in chosen.photos} == set(Path(folder).iterdir())
    assert len(chosen.photos) == sum(reason is None for _, reason in chosen.verdicts) <= MOST
    assert len(chosen.verdicts) <= MOST_FILES
    assert all(name.isprintable() and name for name, _ in chosen.verdicts)
    return bool(chosen.photos)


def fuzz(make: Callable[[], list[bytes]], check: Callable[[bytes], bool], first: int, last: int) -> None:
    """Tries so many mutations of what `make` makes; prints how much more memory that took than the whole ones."""
    process, wholes, good = psutil.Process(), make(), 0
    with TemporaryDirectory() as here:
        os.chdir(here)
        tempfile.tempdir = here
        for whole in wholes:
            check(whole)
        files, before = process.num_fds(), forget_peak()
        for number in range(first, last):
            chance = random.Random(number)
            content = mutated(chance.choice(wholes), wholes, chance)
            try:
                good += check(content)
            except BaseException as error:
                raise AssertionError(f"mutation {number}") from error
        grown = peak() - before
        assert process.num_fds() == files
        assert os.listdir(here) == []
        os.chdir(ROOT)
    assert 0 < good < last - first, good
    print(grown)


FUZZ = """
import sys
from tests.domain.test_photos import *
fuzz({make}, {check}, *map(int, sys.argv[1:]))
"""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutated_photos_are_refused_or_good(chunk: int) -> None:
    count = MUTATIONS // CHUNKS
    script = FUZZ.format(make="whole_photos", check="check_photo")
    assert measured(script, chunk * count, (chunk + 1) * count) < 80_000_000


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutated_archives_are_refused_or_good(chunk: int) -> None:
    count = ARCHIVES // CHUNKS
    script = FUZZ.format(make="whole_archives", check="check_archive")
    assert measured(script, chunk * count, (chunk + 1) * count) < 80_000_000


MEASURE_ARCHIVE = """
import io, sys
from tests.domain.test_photos import *
from tests.memory import forget_peak, peak
check_archive(whole_archives()[1])
content = Path(sys.argv[1]).read_bytes()
before = forget_peak()
check_archive(content)
print(peak() - before)
"""
HEAVY: dict[str, Callable[[], bytes]] = {
    "deflated zeros": lambda: forged(Entry(b"1.png", zeros(1000), DEFLATED, 2**32 - 16)),
    "many files of zeros": lambda: forged(*(Entry(b"%d.png" % n, zeros(3), DEFLATED, 2**31) for n in range(10))),
    "zeros in bzip2": lambda: packed(("1.png", bytes(100_000_000)), method=BZIP2),
    "zeros in LZMA": lambda: packed(("1.png", bytes(100_000_000)), method=LZMA),
    "an index that its old end denies": lambda: crowded(250_000, told=3),
}


@pytest.mark.parametrize("what", HEAVY)
def test_no_archive_takes_much_memory(tmp_path: Path, what: str) -> None:
    (tmp_path / "heavy.zip").write_bytes(HEAVY[what]())
    assert measured(MEASURE_ARCHIVE, tmp_path / "heavy.zip") < 80_000_000


@pytest.mark.parametrize("method", [BZIP2, LZMA, 1, 6, 9, 93, 99])
def test_an_archive_of_an_odd_method_is_refused(method: int) -> None:
    """As some raise what `zipfile` does not tell of, and have no bound to what they unpack."""
    for data in (b"\x09\x04\x05\0]\0\0\1\0" + b"\xff" * 99, b"BZh9" + b"\xff" * 99, bytes(99)):
        with pytest.raises(InvalidRequest, match="no ZIP that can be read"):
            list(photos.in_archive(io.BytesIO(forged(Entry(b"1.png", data, method, 99)))))


def test_a_file_without_a_name_is_refused() -> None:
    """Names end at their first NUL."""
    for name in (b"", b"\0", b"\0.png"):
        with pytest.raises(InvalidRequest, match="no ZIP that can be read"):
            list(photos.in_archive(io.BytesIO(forged(Entry(name, b"x", size=1)))))
