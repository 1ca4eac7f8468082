"""The twelve places behind a portrait. Each fills the whole picture, however wide or tall it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.shapes import BOTTOM, CENTRE, RGB, WHITE, Pen
from training.world import Scene

PAINTS: dict[str, RGB] = {
    "red": (214, 52, 48),
    "blue": (50, 100, 214),
    "green": (56, 160, 86),
    "yellow": (248, 210, 66),
    "purple": (134, 74, 186),
    "white": (246, 246, 244),
}
_BOOKS: tuple[RGB, ...] = ((176, 52, 46), (52, 94, 160), (214, 172, 70), (62, 126, 74), (124, 74, 138), (206, 124, 62))
_TRUNK: RGB = (112, 74, 44)


def draw_place(pen: Pen, scene: Scene) -> None:
    _PLACES[scene.place](pen, scene)
    if scene.light == "cinematic":
        pen.glow((255, 150, 60), (6, 16, 44), 170, 250, 430, inner_alpha=0.3, outer_alpha=0.78)


def _tiles(pen: Pen, step: float) -> Iterator[int]:
    """Indices i such that tiles [CENTRE + i * step, ... + step) cover the width."""
    first = int((pen.left - CENTRE) // step)
    yield from range(first, int((pen.right - CENTRE) // step) + 1)


def _plain(pen: Pen, scene: Scene) -> None:
    pen.fill(PAINTS[scene.wall])


def _space(pen: Pen, _: Scene) -> None:
    pen.fade((14, 12, 46), (50, 26, 96))
    stars = (
        (24, 190),
        (70, 340),
        (180, 36),
        (110, 60),
        (330, 34),
        (478, 300),
        (420, 210),
        (500, 420),
        (30, 470),
        (470, 40),
        (60, 260),
    )
    for tile in range(int(pen.left // 512), int(pen.right // 512) + 1):
        for row in range(int(pen.top // 512), 1):
            for x, y in stars:
                pen.oval((255, 250, 220), x + 512 * tile, y + 512 * row, 5)
    pen.oval((240, 160, 70), 432, 110, 46)
    with pen.moved(432, 110, turn=-20):
        pen.oval((250, 215, 160), 0, 0, 76, 18, stroke=9)


def _studio(pen: Pen, _: Scene) -> None:
    pen.glow((214, 216, 222), (96, 100, 112), CENTRE, 210, 430)


def _library(pen: Pen, _: Scene) -> None:
    pen.fill((86, 54, 32))
    shelf = BOTTOM
    row = 0
    while shelf > pen.top - 128:
        for i in _tiles(pen, 42):
            x = CENTRE + 42 * i
            height = (100, 84, 94)[(i * 5 + row * 2) % 3]
            pen.box(_BOOKS[(i * 7 + row * 4 + i // 6) % 6], x + 2, shelf - 16 - height, x + 40, shelf - 16, radius=3)
        pen.box((140, 94, 54), pen.left, shelf - 16, pen.right, shelf)
        shelf -= 128
        row += 1


def _city(pen: Pen, _: Scene) -> None:
    pen.fade((104, 180, 242), (214, 236, 252))
    for i in _tiles(pen, 88):
        x = CENTRE + 88 * i + 4
        height = (300, 380, 250, 340)[i % 4]
        pen.box(((124, 132, 154), (150, 148, 160), (108, 118, 144))[i % 3], x, BOTTOM - height, x + 80, BOTTOM)
        for y in range(int(BOTTOM - height) + 20, int(BOTTOM), 44):
            for dx in (14, 46):
                pen.box((250, 232, 160), x + dx, y, x + dx + 20, y + 24)


def _beach(pen: Pen, _: Scene) -> None:
    pen.fade((86, 186, 246), (190, 232, 252), bottom=290)
    pen.box((34, 134, 204), pen.left, 270, pen.right, 392)
    pen.box((244, 218, 152), pen.left, 380, pen.right, BOTTOM)
    pen.oval((255, 226, 84), 84, 84, 46)
    pen.shape((134, 92, 52), (424, 410), (414, 280, 440, 176), (454, 176), (434, 290, 448, 410))
    for turn in (-165, -125, -75, -35, 10, 165):
        with pen.moved(446, 176, turn=turn):
            pen.shape((40, 148, 72), (0, 0), (46, -34, 96, 10), (44, 2, 0, 10))


def _castle(pen: Pen, _: Scene) -> None:
    pen.fade((140, 190, 238), (226, 234, 242))
    stone, dark = (142, 138, 146), (114, 110, 122)
    pen.box(stone, pen.left, 200, pen.right, BOTTOM)
    for i in _tiles(pen, 64):
        pen.box(stone, CENTRE + 64 * i + 12, 168, CENTRE + 64 * i + 52, 202)
    for i, y in enumerate(range(236, 512, 62)):
        for j in _tiles(pen, 96):
            x = CENTRE + 96 * j + 48 * (i % 2)
            pen.box((164, 160, 168), x, y, x + 56, y + 20, radius=4)
    for x in (56, 456):
        pen.box(dark, x - 48, 110, x + 48, BOTTOM)
        pen.shape((190, 48, 56), (x - 60, 112), (x, 14), (x + 60, 112))
        pen.box((46, 42, 56), x - 14, 160, x + 14, 216, radius=14)


def _forest(pen: Pen, _: Scene) -> None:
    pen.fade((196, 232, 206), (134, 190, 138))
    pen.box((84, 140, 62), pen.left, 404, pen.right, BOTTOM)
    for i in _tiles(pen, 104):
        x, top = CENTRE + 104 * i + 52, (96, 140, 70, 120)[i % 4]
        pen.box(_TRUNK, x - 10, 340, x + 10, 446)
        for k in range(3):
            y, half = top + 82 * k, 34 + 13 * k
            pen.shape(((34, 104, 54), (50, 124, 60))[i % 2], (x, y), (x - half, y + 116), (x + half, y + 116))


def _kitchen(pen: Pen, _: Scene) -> None:
    pen.fill((250, 236, 206))
    for i in _tiles(pen, 72):
        for j in range(3):
            pen.box((176, 218, 222), CENTRE + 72 * i + 4, 162 + 66 * j, CENTRE + 72 * i + 68, 222 + 66 * j, radius=5)
    pen.box((166, 98, 54), pen.left, pen.top, pen.right, 148)
    for i in _tiles(pen, 128):
        x = CENTRE + 128 * i
        pen.box((216, 146, 88), x + 8, 12, x + 120, 134, radius=7)
        pen.oval((92, 58, 38), x + 104, 76, 9)
    pen.box((84, 86, 94), pen.left, 360, pen.right, 386)
    pen.box((208, 138, 82), pen.left, 386, pen.right, BOTTOM)


def _office(pen: Pen, _: Scene) -> None:
    pen.fill((212, 220, 228))
    pen.box(WHITE, 12, 50, 172, 270)
    pen.box((128, 196, 240), 26, 64, 86, 256)
    pen.box((128, 196, 240), 98, 64, 158, 256)
    pen.box((150, 106, 68), 372, 128, 512, 144)
    for i, colour in enumerate(_BOOKS[:4]):
        pen.box(colour, 384 + 30 * i, 54, 410 + 30 * i, 128, radius=3)
    pen.box((164, 116, 74), pen.left, 420, pen.right, BOTTOM)
    pen.box((56, 60, 70), 396, 250, 508, 344, radius=7)
    pen.box((96, 150, 210), 406, 260, 498, 334)
    pen.box((56, 60, 70), 440, 344, 464, 420)


def _mountains(pen: Pen, _: Scene) -> None:
    pen.fade((110, 184, 240), (226, 242, 252))
    for i in _tiles(pen, 256):
        for x, peak, half in ((CENTRE + 256 * i - 20, 130, 190), (CENTRE + 256 * i + 150, 60, 200)):
            pen.shape(((110, 126, 156), (92, 108, 142))[peak == 60], (x, peak), (x - half, 520), (x + half, 520))
            slope = half / (520 - peak)
            pen.shape(
                WHITE,
                (x, peak),
                (x - 96 * slope, peak + 96),
                (x - 30 * slope, peak + 76),
                (x + 20 * slope, peak + 104),
                (x + 96 * slope, peak + 96),
            )
    pen.box((92, 158, 92), pen.left, 452, pen.right, BOTTOM)


def _sunset(pen: Pen, _: Scene) -> None:
    pen.fade((94, 44, 128), (255, 150, 74), bottom=410)
    pen.oval((255, 226, 110), 400, 330, 92)
    pen.box((78, 40, 88), pen.left, 400, pen.right, BOTTOM)
    for y, half in ((420, 70), (448, 50), (478, 32)):
        pen.box((250, 170, 90), 400 - half, y, 400 + half, y + 11, radius=5)


_PLACES: dict[str, Callable[[Pen, Scene], None]] = {
    "plain": _plain,
    "space": _space,
    "studio": _studio,
    "library": _library,
    "city": _city,
    "beach": _beach,
    "castle": _castle,
    "forest": _forest,
    "kitchen": _kitchen,
    "office": _office,
    "mountains": _mountains,
    "sunset": _sunset,
}
