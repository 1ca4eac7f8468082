from random import Random

import pytest

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.world import (
    ATTRIBUTES,
    SITTERS,
    Spec,
    held_out_spec,
    is_held_out,
    named_people,
    random_face,
    random_scene,
    random_spec,
)


def test_sitters_are_never_drawn_in_training() -> None:
    rng = Random(0)
    descriptions = {random_spec(rng).identity.description() for _ in range(3000)}
    descriptions |= {person.description() for person in named_people().values()}
    assert not any(is_held_out(random_spec(rng).identity) for _ in range(500))
    assert not descriptions & {sitter.description() for sitter in SITTERS.values()}


def test_held_out_people_are_held_out() -> None:
    rng = Random(1)
    assert all(is_held_out(held_out_spec(rng).identity) for _ in range(50))


def test_every_value_of_every_attribute_occurs() -> None:
    rng = Random(2)
    specs = [random_spec(rng) for _ in range(1500)]
    for attribute, values in ATTRIBUTES.items():
        assert {spec.value(attribute) for spec in specs} == set(values)


def test_the_same_seed_gives_the_same_picture() -> None:
    assert random_spec(Random(7)) == random_spec(Random(7))


def test_two_hundred_different_people_have_names() -> None:
    people = named_people()
    assert len(people) == 200
    assert len({person.description() for person in people.values()}) == 200
    assert "sks" not in people


def test_eyes_do_not_show_behind_sunglasses() -> None:
    rng = Random(3)
    while (spec := random_spec(rng)).identity.glasses != "sunglasses":
        pass
    assert not spec.shows("eyes")
    assert spec.shows("glasses")


def test_faces_differ_beyond_their_description() -> None:
    rng = Random(4)
    assert random_face(rng) != random_face(rng)
    assert all(-1 <= value <= 1 for value in random_face(rng).values())
    assert Spec(SITTERS["ada"], random_scene(rng)).identity.face != SITTERS["chi"].face
