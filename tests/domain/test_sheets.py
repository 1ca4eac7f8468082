import io

import pytest
from PIL import Image

from api.domain.sheets import GAP, LABEL_WIDTH, PAPER, sheet


def png(color: str, size: tuple[int, int] = (64, 32)) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, color).save(written, "PNG")
    return written.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_every_picture_is_in_its_place() -> None:
    colors = {(0, 0): "red", (1, 0): "lime", (0, 1): "blue"}
    image = opened(
        sheet(
            ("Steps", "Who"),
            ["10", "20"],
            ["Ada", "Bo"],
            (64, 32),
            lambda column, row: png(colors[column, row]) if (column, row) in colors else None,
        )
    )
    left, bottom = 2 * GAP + LABEL_WIDTH, image.height - GAP
    at = {
        (column, row): (left + column * 524 + 8, bottom - (2 - row) * 268 + 20) for column in (0, 1) for row in (0, 1)
    }
    found = {place: image.getpixel(point) for place, point in at.items()}
    paper = Image.new("RGB", (1, 1), PAPER).getpixel((0, 0))
    assert found == {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): paper}
    assert image.width == left + 2 * (512 + GAP)


def test_labels_are_written() -> None:
    def inked(label: str) -> int:
        image = opened(sheet(("Steps",), [label], ["Ada"], (64, 64), lambda *_: None)).convert("L")
        return sum(image.crop((2 * GAP + LABEL_WIDTH, 0, image.width, 2 * GAP)).histogram()[:128])

    assert inked("") == 0 < inked("7.5") < inked("7.5 and more")


@pytest.mark.parametrize("label", ["W" * 2000, "word " * 400, "a\n" * 300, "שלום 🧑‍🚀", "…", " "])
def test_labels_stay_in_their_room(label: str) -> None:
    size = (512, 512)
    plain = opened(sheet(("Steps",), ["1", "2"], ["3"], size, lambda *_: png("red", size)))
    image = opened(sheet(("Steps",), [label, "2"], [label], size, lambda *_: png("red", size)))
    assert image.width == plain.width
    assert image.height <= plain.height + 200
    left = 2 * GAP + LABEL_WIDTH
    for x, y in ((left + 1, image.height - GAP - 2), (left + 512 + GAP + 1, image.height - GAP - 2)):
        assert image.getpixel((x, y)) == (255, 0, 0)


def test_many_pictures_are_smaller() -> None:
    numbers = [str(number) for number in range(6)]
    image = opened(sheet(("Steps", "Seed"), numbers, numbers, (1024, 1024), lambda *_: None))
    assert image.width * image.height < 5_000_000
