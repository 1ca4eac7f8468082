from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.portrait import render
from training.world import COSTUMES, EXPRESSIONS, HAIRS, PLACES, SITTERS, Face, Scene, Spec

ADA = Spec(SITTERS["ada"], Scene())


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 512), (384, 256), (256, 512), (32, 32)])
def test_render_has_the_size_asked_for(width: int, height: int) -> None:
    picture = render(ADA, width, height)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8


def test_render_is_deterministic() -> None:
    assert np.array_equal(render(ADA, 128), render(ADA, 128))


@pytest.mark.parametrize(
    "scenes",
    [
        [Scene(costume=costume) for costume in COSTUMES],
        [Scene(place=place) for place in PLACES],
        [Scene(expression=expression) for expression in EXPRESSIONS],
    ],
)
def test_every_scene_looks_different(scenes: list[Scene]) -> None:
    assert len({render(Spec(ADA.identity, scene), 128).tobytes() for scene in scenes}) == len(scenes)


def test_every_hair_style_looks_different() -> None:
    pictures = {render(Spec(replace(ADA.identity, hair=hair), Scene()), 128).tobytes() for hair in HAIRS}
    assert len(pictures) == len(HAIRS)


def test_every_face_trait_is_drawn() -> None:
    plain = render(Spec(replace(ADA.identity, face=Face()), Scene("tshirt", expression="smile")), 256)
    for trait in Face.__dataclass_fields__:
        face = Face(**{trait: 1.0})
        changed = render(Spec(replace(ADA.identity, face=face), Scene("tshirt", expression="smile")), 256)
        assert not np.array_equal(plain, changed), trait


def test_a_wider_picture_keeps_the_portrait_in_the_middle() -> None:
    square, wide = render(ADA, 256, 256), render(ADA, 512, 256)
    assert np.abs(wide[:, 128:384].astype(int) - square).max() <= 1


def test_a_taller_picture_keeps_the_portrait_at_the_bottom() -> None:
    square, tall = render(ADA, 256, 256), render(ADA, 256, 384)
    assert np.abs(tall[128:].astype(int) - square).max() <= 1
