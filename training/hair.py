"""Nine hair styles, in two layers: what falls behind the head and what frames the face."""

from __future__ import annotations

import math

from training.shapes import RGB, Pen, shade

CX, CY, HEIGHT = 256.0, 215.0, 110.0
TOP = CY - HEIGHT


def draw_hair_behind(pen: Pen, style: str, colour: RGB, width: float) -> None:
    """`width` is half the head's."""
    dark = shade(colour, 0.84)
    left, right = CX - width, CX + width
    if style == "long":
        pen.shape(
            dark,
            (CX, 78),
            (left - 54, 76, left - 34, 250, left - 40, 424),
            (right + 40, 424),
            (right + 34, 250, right + 54, 76, CX, 78),
        )
    elif style == "bob":
        pen.box(dark, left - 28, 88, right + 28, 322, radius=76)
    elif style == "curly":
        for i in range(11):
            turn = math.pi * (0.86 + 1.28 * i / 10)
            pen.oval(colour, CX + (width + 22) * math.cos(turn), 190 + 112 * math.sin(turn), 44)
        pen.oval(colour, CX, 186, width + 26, 116)
    elif style == "ponytail":
        pen.shape(dark, (322, 96), (452, 84, 470, 260, 404, 388), (384, 316, 366, 270, 330, 200))


def draw_hair_front(pen: Pen, style: str, colour: RGB, width: float) -> None:
    left, right = CX - width, CX + width
    if style == "mohawk":
        pen.shape(
            colour,
            (CX - 34, TOP + 46),
            (CX - 60, TOP - 50, CX, TOP - 58),
            (CX + 60, TOP - 50, CX + 34, TOP + 46),
            (CX, TOP + 26, CX - 34, TOP + 46),
        )
    elif style == "short":
        pen.shape(
            colour,
            (left - 6, CY - 6),
            (left - 16, TOP - 28, CX - 40, TOP - 34, CX + 6, TOP - 24),
            (right + 30, TOP - 28, right + 14, CY - 60, right + 6, CY - 6),
            (right - 4, CY - 56, right - 34, CY - 60),
            (CX - 10, CY - 58, left + 30, CY - 74),
            (left + 4, CY - 52, left - 6, CY - 6),
        )
    elif style == "spiky":
        _spikes(pen, colour, left, right)
    elif style == "curly":
        for i in range(7):
            t = i / 6
            pen.oval(colour, left + 6 + t * (2 * width - 12), TOP + 20 + 34 * abs(2 * t - 1) ** 2, 28, 26)
    elif style == "bob":
        pen.shape(
            colour,
            (left - 26, CY + 60),
            (left - 44, TOP - 30, CX - 60, TOP - 34, CX, TOP - 30),
            (CX + 60, TOP - 34, right + 44, TOP - 30, right + 26, CY + 60),
            (right - 2, CY + 40, right - 6, CY - 52),
            (CX, CY - 40, left + 6, CY - 52),
            (left + 2, CY + 40, left - 26, CY + 60),
        )
    elif style == "long":
        _parted(pen, colour, left, right, CY + 14)
    elif style in ("ponytail", "bun"):
        if style == "bun":
            pen.oval(shade(colour, 0.84), CX, 68, 52, 46)
        _swept(pen, colour, left, right)
        if style == "ponytail":
            pen.oval((236, 60, 110), 344, 110, 17)


def _parted(pen: Pen, colour: RGB, left: float, right: float, low: float) -> None:
    pen.shape(
        colour,
        (left - 14, low),
        (left - 28, TOP - 30, CX - 60, TOP - 32, CX, TOP - 26),
        (CX + 60, TOP - 32, right + 28, TOP - 30, right + 14, low),
        (right + 2, CY - 50, CX + 24, TOP + 26),
        (left + 6, CY - 60, left - 14, low),
    )


def _swept(pen: Pen, colour: RGB, left: float, right: float) -> None:
    """Hair drawn back from a high forehead."""
    pen.shape(
        colour,
        (left - 8, CY - 18),
        (left - 18, TOP - 26, CX - 50, TOP - 28, CX, TOP - 24),
        (CX + 50, TOP - 28, right + 18, TOP - 26, right + 8, CY - 18),
        (right - 8, CY - 84, CX, TOP + 32),
        (left + 8, CY - 84, left - 8, CY - 18),
    )


def _spikes(pen: Pen, colour: RGB, left: float, right: float) -> None:
    points: list[tuple[float, ...]] = [(left - 6, CY - 10)]
    spikes = 7
    for i in range(spikes):
        t = i / (spikes - 1)
        points.append(
            (
                left - 10 + t * (right - left + 20) + (t - 0.5) * 34,
                TOP - 26 - 34 * math.sin(t * math.pi) + 26 * abs(2 * t - 1),
            )
        )
        if i < spikes - 1:
            t += 0.5 / (spikes - 1)
            points.append((left - 8 + t * (right - left + 16), TOP + 8 + 24 * abs(2 * t - 1)))
    points += [(right + 6, CY - 10), (right - 14, CY - 54), (CX, TOP + 44), (left + 14, CY - 54)]
    pen.shape(colour, *points)
