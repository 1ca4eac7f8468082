"""A grid of pictures as one picture, with what varies written at its edges."""

import io
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, LINE = "#f7f5f1", "#1d1b19", "#e4dfd6"
SIDE, SMALL_SIDE, FEW = 512, 320, 12  # pixels of a cell's longer side, and in a sheet of more than FEW
GAP = 12
LABEL_WIDTH, LINES, LETTERS = 200, 4, 500
TEXT, LEADING = 20, 30  # pixels of a letter, and from line to line

PngAt = Callable[[int, int], bytes | None]


def sheet(
    corner: Sequence[str], columns: Sequence[str], rows: Sequence[str], size: tuple[int, int], png_at: PngAt
) -> bytes:
    """Returns the sheet as PNG.

    Args:
        corner: what the columns vary, and what the rows do.
        columns: a label for each.
        rows: likewise.
        size: pixels that every picture fits in.
        png_at: the picture at a column and a row, if there is one. One at a time is held in memory.
    """
    longest = SIDE if len(columns) * len(rows) <= FEW else SMALL_SIDE
    width, height = (side * longest // max(size) for side in size)
    font = ImageFont.load_default(TEXT)
    heads = [_wrapped(label, font, width) for label in columns]
    top = GAP * 2 + LEADING * max(len(corner), *(head.count("\n") + 1 for head in heads))
    left = GAP * 2 + LABEL_WIDTH
    whole = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    pen = ImageDraw.Draw(whole)

    def write(at: tuple[int, int], text: str) -> None:
        pen.multiline_text(at, text, fill=INK, font=font, spacing=LEADING - TEXT)

    write((GAP, GAP), "\n".join(_wrapped(one, font, LABEL_WIDTH) for one in corner))
    for column, head in enumerate(heads):
        write((left + column * (width + GAP), GAP), head)
    for row, label in enumerate(rows):
        y = top + row * (height + GAP)
        write((GAP, y), _wrapped(label, font, LABEL_WIDTH))
        for column in range(len(columns)):
            x = left + column * (width + GAP)
            if png := png_at(column, row):
                whole.paste(_small(png, (width, height)), (x, y))
            else:
                pen.rectangle((x, y, x + width - 1, y + height - 1), outline=LINE)
    written = io.BytesIO()
    whole.save(written, "PNG")
    return written.getvalue()


def _small(png: bytes, size: tuple[int, int]) -> Image.Image:
    with Image.open(io.BytesIO(png)) as picture:
        small = picture.convert("RGB")
        small.thumbnail(size, Image.Resampling.LANCZOS)
        return small


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrapped(text: str, font: Font, width: int) -> str:
    """Returns the text in lines that are no wider than `width`, its end left out if there is no room for it."""
    lines: list[str] = []
    for paragraph in text[:LETTERS].split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    if len(lines) > LINES:
        lines[LINES - 1 :] = [lines[LINES - 1] + " …"]
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(line: str, font: Font, width: int) -> str:
    while font.getlength(line) > width:
        line = line[:-2] + "…"
    return line
