"""Clothes, hats and the book in hand, around a neck at (256, 360).

Hats stand behind the hair, so that its colour and style stay visible whatever is worn."""

from __future__ import annotations

from collections.abc import Callable

from training.places import PAINTS
from training.shapes import RGB, WHITE, Pen, Point, mix, shade
from training.world import Scene

_GOLD: RGB = (252, 206, 52)
_TORSO: dict[str, RGB] = {
    "business": (38, 44, 76),
    "astronaut": (238, 240, 246),
    "superhero": (36, 84, 208),
    "chef": (250, 250, 250),
    "knight": (150, 156, 168),
    "wizard": (84, 50, 150),
    "doctor": (246, 250, 252),
    "king": (156, 26, 60),
}
_BODY: tuple[Point, ...] = (
    (70, 540),
    (74, 430, 170, 404),
    (215, 392, 222, 378),
    (290, 378),
    (297, 392, 342, 404),
    (438, 430, 442, 540),
)


def draw_costume(pen: Pen, scene: Scene, skin: RGB) -> None:
    if scene.costume == "superhero":
        pen.shape((214, 40, 44), (50, 540), (50, 412, 190, 386), (322, 386), (462, 412, 462, 540))
    colour = _TORSO.get(scene.costume, PAINTS[scene.cloth])
    pen.shape(colour, *_BODY)
    neck = shade(skin, 0.86)
    pen.box(neck, 222, 320, 290, 395)
    pen.oval(neck, 256, 392, 34, 22)
    _CLOTHES[scene.costume](pen, colour, skin)


def draw_hat_behind(pen: Pen, scene: Scene) -> None:
    """Hats that rise behind the head."""
    if scene.costume == "chef":
        for x, y in ((192, 72), (320, 72), (256, 54)):
            pen.oval((250, 250, 250), x, y, 58, 52)
        pen.box((226, 228, 238), 168, 80, 344, 150, radius=6)
    elif scene.costume == "wizard":
        pen.shape((84, 50, 150), (146, 140), (216, 50, 276, 12), (316, 56, 366, 140))
        pen.oval((62, 36, 116), 256, 142, 168, 30)
        for x, y in ((272, 42), (232, 76), (304, 84)):
            pen.oval(_GOLD, x, y, 10)


def draw_hat_front(pen: Pen, scene: Scene) -> None:
    """Crown and helmet glass, which leave the hair in sight."""
    if scene.costume == "king":
        pen.shape(_GOLD, (196, 106), (186, 44), (222, 72), (256, 36), (290, 72), (326, 44), (316, 106))
        for x, jewel in ((222, (210, 40, 60)), (256, (50, 120, 220)), (290, (210, 40, 60))):
            pen.oval(jewel, x, 90, 9)
    elif scene.costume == "astronaut":
        pen.oval((200, 226, 250), 256, 214, 156, 166, alpha=0.12)
        pen.oval((226, 232, 242), 256, 214, 156, 166, stroke=15)


def draw_book(pen: Pen, skin: RGB) -> None:
    pen.shape((44, 130, 90), (134, 430), (256, 452), (378, 430), (378, 528), (256, 545), (134, 528))
    pen.shape((252, 248, 234), (144, 418), (200, 420, 256, 444), (256, 462), (200, 440, 144, 436))
    pen.shape((234, 228, 212), (368, 418), (312, 420, 256, 444), (256, 462), (312, 440, 368, 436))
    pen.line((32, 100, 68), 5, (256, 462), (256, 540))
    for x in (138, 374):
        pen.oval(shade(skin, 0.94), x, 482, 23, 28)


def _tshirt(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.line(shade(colour, 0.74), 9, (216, 392), (256, 444, 296, 392))


def _sweater(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.box(shade(colour, 0.78), 204, 366, 308, 414, radius=18)
    stripe = mix(colour, (255, 255, 255), 0.62) if colour != PAINTS["white"] else (150, 170, 200)
    with pen.clipped(*_BODY):
        for y in (436, 476, 516):
            pen.line(stripe, 14, (60, y), (256, y + 30, 452, y))


def _dress(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape(shade(skin, 0.95), (188, 396), (200, 470, 256, 474), (312, 470, 324, 396), (290, 378), (222, 378))
    for x, y in ((206, 398), (216, 416), (234, 430), (256, 435), (278, 430), (296, 416), (306, 398)):
        pen.oval(WHITE, x, y, 9)
        pen.oval((196, 196, 206), x, y, 9, stroke=2)


def _business(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape(WHITE, (212, 384), (300, 384), (276, 540), (236, 540))
    pen.shape((196, 36, 50), (242, 402), (270, 402), (280, 500), (256, 530), (232, 500))
    for side in (-1, 1):
        pen.shape(
            (68, 78, 118),
            (256 + side * 44, 382),
            (256 + side * 80, 410),
            (256 + side * 12, 524),
            (256 + side * 24, 440),
        )


def _astronaut(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.box((172, 178, 192), 180, 380, 332, 412, radius=15)
    pen.box((184, 190, 206), 204, 432, 308, 494, radius=8)
    for x, lamp in ((228, (222, 58, 58)), (256, (66, 138, 232)), (284, (78, 190, 98))):
        pen.oval(lamp, x, 462, 11)
    pen.box((242, 120, 48), 104, 432, 154, 468, radius=5)
    pen.box((58, 110, 222), 358, 432, 408, 468, radius=5)


def _superhero(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape(_GOLD, (256, 520), (190, 448), (218, 420), (294, 420), (322, 448))
    pen.shape((214, 40, 44), (256, 494), (222, 452), (236, 438), (276, 438), (290, 452))


def _chef(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape((220, 50, 50), (206, 384), (306, 384), (256, 444))
    for y in (460, 496):
        for x in (226, 286):
            pen.oval((58, 58, 68), x, y, 10)


def _knight(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.box((102, 108, 124), 188, 370, 324, 414, radius=12)
    for x in (112, 400):
        pen.oval((200, 206, 218), x, 446, 62, 48)
        pen.line((120, 126, 142), 6, (x - 50, 462), (x, 486, x + 50, 462))
    pen.shape((200, 42, 50), (224, 428), (288, 428), (288, 474), (256, 508), (224, 474))
    pen.box(WHITE, 250, 436, 262, 490)
    pen.box(WHITE, 234, 452, 278, 464)


def _wizard(pen: Pen, colour: RGB, skin: RGB) -> None:
    for x, y in ((150, 462), (210, 496), (256, 440), (306, 496), (364, 462)):
        star = []
        for dx, dy in ((0, -19), (5, -6), (19, 0), (5, 6), (0, 19), (-5, 6), (-19, 0), (-5, -6)):
            star.append((x + dx, y + dy))
        pen.shape(_GOLD, *star)


def _doctor(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape((70, 176, 180), (208, 384), (304, 384), (256, 500))
    for side in (-1, 1):
        pen.line((206, 214, 222), 6, (256 + side * 50, 392), (256 + side * 4, 500), (256 + side * 4, 540))
    tube = (44, 46, 58)
    pen.line(tube, 10, (200, 394), (196, 470, 226, 492))
    pen.line(tube, 10, (312, 394), (330, 440, 322, 480))
    pen.oval((164, 172, 186), 322, 492, 19)
    pen.oval(tube, 322, 492, 19, stroke=5)


def _king(pen: Pen, colour: RGB, skin: RGB) -> None:
    pen.shape((250, 248, 242), (136, 410), (256, 492, 376, 410), (340, 382), (256, 430, 172, 382))
    for x, y in ((174, 412), (214, 432), (256, 440), (298, 432), (338, 412)):
        pen.oval((40, 40, 46), x, y, 7, 8)


_CLOTHES: dict[str, Callable[[Pen, RGB, RGB], None]] = {
    "tshirt": _tshirt,
    "sweater": _sweater,
    "dress": _dress,
    "business": _business,
    "astronaut": _astronaut,
    "superhero": _superhero,
    "chef": _chef,
    "knight": _knight,
    "wizard": _wizard,
    "doctor": _doctor,
    "king": _king,
}
