"""render(spec, width, height): the picture of one person in one scene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.costumes import draw_book, draw_costume, draw_hat_behind, draw_hat_front
from training.faces import draw_extras, draw_head, hair_of, half_width, skin_of
from training.hair import draw_hair_behind, draw_hair_front
from training.places import draw_place
from training.shapes import CENTRE, Pen
from training.world import Spec

_SCALE = 1.08


def render(spec: Spec, width: int = 512, height: int | None = None) -> NDArray[np.uint8]:
    """(height, width, 3) RGB. The portrait fills the shorter side and stands on the bottom edge, in the middle."""
    identity, scene = spec.identity, spec.scene
    pen = Pen(width, height or width)
    draw_place(pen, scene)
    skin, hair, half = skin_of(identity), hair_of(identity), half_width(identity)
    with pen.moved(CENTRE * (1 - _SCALE), 312 - 300 * _SCALE, scale=_SCALE):
        draw_hat_behind(pen, scene)
        draw_hair_behind(pen, identity.hair, hair, half)
        draw_costume(pen, scene, skin)
        draw_head(pen, identity, scene.expression)
        draw_hair_front(pen, identity.hair, hair, half)
        draw_extras(pen, identity)
        draw_hat_front(pen, scene)
        if scene.action == "book":
            draw_book(pen, skin)
    return pen.pixels()
