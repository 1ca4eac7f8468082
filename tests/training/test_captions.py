from random import Random

import pytest

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.captions import caption
from training.tokenizer import MAX_LENGTH, build
from training.world import ATTRIBUTES, SITTERS, Scene, Spec, named_people, random_spec

WORD = {  # a word that must stand in every caption that names the attribute's value
    ("costume", "astronaut"): ("astronaut", "space", "cosmonaut"),
    ("costume", "knight"): ("knight", "armor"),
    ("costume", "chef"): ("chef", "cook"),
    ("place", "library"): ("library", "books"),
    ("place", "beach"): ("beach", "sea"),
    ("place", "sunset"): ("sunset", "dusk", "golden hour"),
    ("glasses", "glasses"): ("glasses",),
    ("glasses", "sunglasses"): ("sunglasses", "shades"),
    ("hair", "bald"): ("bald",),
    ("hair", "mohawk"): ("mohawk",),
    ("beard", "mustache"): ("mustache", "moustache"),
    ("freckles", "yes"): ("freckles",),
    ("earrings", "yes"): ("earrings",),
    ("action", "book"): ("book",),
    ("eyes", "green"): ("green eyes",),
    ("skin", "pale"): ("pale", "fair", "light", "white"),
}


def test_captions_name_what_is_drawn() -> None:
    rng = Random(0)
    checked = set()
    for _ in range(2000):
        spec = random_spec(rng)
        words = caption(spec, rng, detail=1.0)
        for attribute in words.named:
            assert attribute in ATTRIBUTES
            expected = WORD.get((attribute, spec.value(attribute)))
            if expected:
                assert any(word in words.text for word in expected), words.text
                checked.add((attribute, spec.value(attribute)))
    assert checked == set(WORD)


def test_a_full_caption_leaves_no_feature_out() -> None:
    rng = Random(1)
    for _ in range(300):
        spec = random_spec(rng)
        named = caption(spec, rng, detail=1.0).named
        if spec.identity.glasses != "none":
            assert "glasses" in named
        if spec.identity.beard != "none":
            assert "beard" in named
        assert named & {"hair", "hair_colour"}


def test_who_stands_for_the_whole_person() -> None:
    rng = Random(2)
    for _ in range(100):
        words = caption(Spec(SITTERS["bo"], Scene("knight", place="castle")), rng, who="sks person")
        assert "sks person" in words.text
        assert "glasses" not in words.text
        assert not words.named & {"hair", "hair_colour", "skin", "glasses", "beard"}


def test_named_people_go_by_name_alone() -> None:
    rng = Random(3)
    name, person = next(iter(named_people().items()))
    texts = [caption(Spec(person, Scene()), rng) for _ in range(60)]
    named = [words for words in texts if words.by_name]
    assert len(named) > 30
    assert all(name in words.text.split() for words in named)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return build()


def test_every_name_is_one_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert [name for name in [*named_people(), "sks"] if len(tokenizer.tokenize(name)) != 1] == []


def test_captions_fit_and_any_text_splits_into_known_pieces(tokenizer) -> None:  # type: ignore[no-untyped-def]
    rng = Random(4)
    lengths = [len(tokenizer(caption(random_spec(rng), rng).text).input_ids) for _ in range(300)]
    assert max(lengths) <= MAX_LENGTH
    ids = tokenizer("Zürich, 東京 & ☂ — quixotic!").input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]
