"""The head: shape, eyes, brows, nose, mouth, beard and glasses. Expressions are exaggerated, so that they survive a
latent cell of 32 pixels."""

from __future__ import annotations

from training.hair import CX, CY, HEIGHT
from training.shapes import INK, RGB, WHITE, Pen, Point, mix, shade
from training.world import Identity

SKIN: dict[str, RGB] = {"pale": (255, 224, 202), "tan": (226, 172, 124), "brown": (164, 106, 66), "dark": (92, 56, 38)}
HAIR: dict[str, RGB] = {
    "black": (32, 28, 34),
    "brown": (116, 70, 36),
    "blonde": (246, 210, 92),
    "red": (214, 66, 22),
    "gray": (164, 166, 174),
    "blue": (44, 96, 230),
    "pink": (246, 124, 184),
}
_EYE: dict[str, RGB] = {"brown": (112, 64, 30), "blue": (44, 124, 236), "green": (34, 160, 76)}
_EYE_Y = CY - 2


def skin_of(identity: Identity) -> RGB:
    return shade(SKIN[identity.skin], 1 + 0.045 * identity.face.skin_shade)


def hair_of(identity: Identity) -> RGB:
    return shade(HAIR[identity.hair_colour], 1 + 0.07 * identity.face.hair_shade)


def half_width(identity: Identity) -> float:
    """Half the head's width, in units."""
    base = 95 if identity.gender == "man" else 90
    return base + 7 * identity.face.width


def draw_head(pen: Pen, identity: Identity, expression: str) -> None:
    """Everything between the hair's two layers."""
    skin, hair, width = skin_of(identity), hair_of(identity), half_width(identity)
    for side in (-1, 1):
        pen.oval(shade(skin, 0.9), CX + side * width, CY + 12, 17, 24)
    outline = _outline(identity, width)
    pen.shape(skin, *outline)
    for side in (-1, 1):
        pen.oval(mix(skin, (240, 84, 84), 0.3), CX + side * width * 0.62, CY + 38, 20, 14)
    if identity.freckles == "yes":
        _freckles(pen, skin, width)
    if identity.beard == "full":
        _beard(pen, outline, skin, shade(hair, 0.9), width)
    _eyes(pen, identity, expression)
    _brows(pen, identity, expression)
    nose = 18 + 8 * identity.face.nose
    pen.line(shade(skin, 0.68), 6, (CX + 2, CY + 6), (CX + nose, CY + 33, CX - 6, CY + 33))
    if identity.beard == "mustache":
        _mustache(pen, shade(hair, 0.85))
    _mouth(pen, identity, expression)


def draw_extras(pen: Pen, identity: Identity) -> None:
    """Glasses and earrings, in front of the hair."""
    width = half_width(identity)
    if identity.earrings == "yes":
        for side in (-1, 1):
            pen.oval((255, 204, 40), CX + side * (width + 7), CY + 52, 14)
            pen.oval((196, 140, 16), CX + side * (width + 7), CY + 52, 14, stroke=4)
    if identity.glasses == "none":
        return
    gap = _eye_gap(identity)
    for side in (-1, 1):
        x = CX + side * gap
        if identity.glasses == "glasses":
            pen.oval(INK, x, _EYE_Y, 34, stroke=9)
        else:
            pen.box((16, 16, 22), x - 38, _EYE_Y - 26, x + 38, _EYE_Y + 28, radius=12)
        pen.line(INK, 8, (x + side * 33, _EYE_Y - 6), (CX + side * width, _EYE_Y - 10))
    pen.line(INK, 8, (CX - gap + 34, _EYE_Y - 4), (CX + gap - 34, _EYE_Y - 4))


def _outline(identity: Identity, width: float) -> tuple[Point, ...]:
    jaw = width * ((0.68 if identity.gender == "man" else 0.54) + 0.13 * identity.face.jaw)
    return (
        (CX - width, CY - 10),
        (CX - width, CY - HEIGHT * 1.32, CX + width, CY - HEIGHT * 1.32, CX + width, CY - 10),
        (CX + width, CY + HEIGHT * 0.62, CX + jaw, CY + HEIGHT, CX, CY + HEIGHT),
        (CX - jaw, CY + HEIGHT, CX - width, CY + HEIGHT * 0.62, CX - width, CY - 10),
    )


def _eye_gap(identity: Identity) -> float:
    """Half the distance between the pupils."""
    return 40 + 4 * identity.face.eye_gap


def _eyes(pen: Pen, identity: Identity, expression: str) -> None:
    size = 1 + 0.12 * identity.face.eye_size
    tall = 1.3 if expression == "surprised" else 0.8 if expression == "angry" else 1.0
    for side in (-1, 1):
        x = CX + side * _eye_gap(identity)
        pen.oval(WHITE, x, _EYE_Y, 25 * size, 20 * size * tall)
        pen.oval(_EYE[identity.eyes], x, _EYE_Y + 1, 15.5 * size)
        pen.oval((12, 12, 18), x, _EYE_Y + 1, 7 * size)
        pen.oval(WHITE, x - 5, _EYE_Y - 5, 4)
        if identity.gender == "woman":
            lid = _EYE_Y - 20 * size * tall
            pen.line(INK, 8, (x - side * 20, _EYE_Y - 12), (x, lid - 8, x + side * 34, lid + 4))


def _brows(pen: Pen, identity: Identity, expression: str) -> None:
    bald = identity.hair == "bald" and identity.beard == "none"
    colour = (84, 56, 40) if bald else shade(hair_of(identity), 0.78)
    thick = (11 if identity.gender == "man" else 8) + 2.5 * identity.face.brow
    y = _EYE_Y - 40 - {"surprised": 20, "laugh": 6}.get(expression, 0)
    tilt = {"angry": 15, "sad": -13}.get(expression, 0)
    for side in (-1, 1):
        x = CX + side * _eye_gap(identity)
        pen.line(colour, thick, (x - side * 20, y + tilt), (x, y - 10 + abs(tilt) / 2, x + side * 22, y - tilt))


def _mouth(pen: Pen, identity: Identity, expression: str) -> None:
    y, wide = CY + 70, 1 + 0.1 * identity.face.mouth
    lip: RGB = (206, 34, 70) if identity.gender == "woman" else (132, 46, 46)
    if identity.gender == "man" and identity.skin == "dark":
        lip = (200, 100, 92)

    def at(dx: float) -> float:
        return CX + dx * wide

    if expression == "neutral":
        pen.line(lip, 10, (at(-28), y), (at(28), y))
    elif expression == "smile":
        pen.line(lip, 10, (at(-42), y - 12), (CX, y + 38, at(42), y - 12))
    elif expression == "laugh":
        pen.shape(
            (124, 24, 38),
            (at(-46), y - 14),
            (at(46), y - 14),
            (at(36), y + 40, CX, y + 40),
            (at(-36), y + 40, at(-46), y - 14),
        )
        pen.box(WHITE, at(-41), y - 14, at(41), y + 4, radius=4)
    elif expression == "sad":
        pen.line(lip, 10, (at(-34), y + 18), (CX, y - 26, at(34), y + 18))
        pen.shape(
            (70, 160, 250),
            (CX + 56, CY + 20),
            (CX + 76, CY + 54, CX + 56, CY + 56),
            (CX + 36, CY + 54, CX + 56, CY + 20),
        )
    elif expression == "surprised":
        pen.oval((112, 28, 40), CX, y + 6, 21 * wide, 27)
        pen.oval(lip, CX, y + 6, 21 * wide, 27, stroke=6)
    else:
        pen.box((112, 28, 40), at(-40), y - 14, at(40), y + 18, radius=12)
        pen.box(WHITE, at(-33), y - 7, at(33), y + 11, radius=6)


def _freckles(pen: Pen, skin: RGB, width: float) -> None:
    for side in (-1, 1):
        for dx, dy in ((0.5, 26), (0.68, 24), (0.4, 40), (0.6, 44), (0.78, 40)):
            pen.oval(shade(skin, 0.62), CX + side * width * dx, CY + dy, 5.5)


def _beard(pen: Pen, outline: tuple[Point, ...], skin: RGB, colour: RGB, width: float) -> None:
    left, right = CX - width, CX + width
    with pen.clipped(*outline):
        pen.shape(
            colour,
            (left - 4, CY + 6),
            (CX - 60, CY + 36, CX - 42, CY + 42),
            (CX, CY + 34, CX + 42, CY + 42),
            (CX + 60, CY + 36, right + 4, CY + 6),
            (right, CY + HEIGHT + 10),
            (left, CY + HEIGHT + 10),
        )
    pen.shape(colour, (CX - 62, CY + 74), (CX, CY + 172, CX + 62, CY + 74))
    pen.oval(skin, CX, CY + 71, 52, 27)


def _mustache(pen: Pen, colour: RGB) -> None:
    pen.shape(
        colour,
        (CX, CY + 38),
        (CX - 40, CY + 30, CX - 70, CY + 66),
        (CX - 26, CY + 66, CX, CY + 56),
        (CX + 26, CY + 66, CX + 70, CY + 66),
        (CX + 40, CY + 30, CX, CY + 38),
    )
