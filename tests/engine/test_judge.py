from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from PIL import Image

from api.config import ROOT
from api.engine.judge import Judge, Scores, Shown, judge
from api.engine.reader import AttributeReader, load_reader
from api.errors import ModelUnavailable

T = TypeVar("T")
SITTERS = ROOT / "models" / "sitters"


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return load_reader(ROOT / "models" / "reader")


def photos(sitter: str) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted((SITTERS / sitter / "pictures").iterdir())]


def at_once(action: Callable[[], T]) -> T:
    return action()


def scores(reader: Judge | None, sitter: str, samples: Sequence[Image.Image]) -> Scores:
    others = photos("chi")
    return judge(reader, Shown(photos(sitter), samples, others[: len(samples)], others[:2], []), at_once)


def test_likeness_tells_a_sitter_from_another(reader: AttributeReader) -> None:
    own, other = scores(reader, "ada", photos("ada")), scores(reader, "ada", photos("bo"))
    assert own.likeness is not None
    assert other.likeness is not None
    assert own.likeness > 0.9
    assert other.likeness < 0.6
    assert other.refusal() == (
        "The samples do not look like the pictures: train more steps, or with more and clearer pictures."
    )


def test_obedience_and_the_class_are_told_by_the_bases_pictures(reader: AttributeReader) -> None:
    """The bundled sitters' photos show the same costumes and places in the same order."""
    same = scores(reader, "ada", photos("ada"))
    assert same.obedience == same.class_kept == 1.0
    assert same.refusal() is None
    turned = scores(reader, "ada", photos("ada")[::-1])
    assert turned.obedience is not None
    assert turned.obedience < 0.7
    assert "what was asked for" in (turned.refusal() or "")
    assert turned.total < same.total


def test_samples_that_are_all_alike_are_refused(reader: AttributeReader) -> None:
    alike = scores(reader, "ada", [photos("ada")[0]] * 4)
    assert alike.variety == 0
    assert "look alike" in (alike.refusal() or "")


def test_a_class_that_became_the_sitter_is_refused(reader: AttributeReader) -> None:
    own = photos("ada")
    spoiled = judge(reader, Shown(own, own, photos("bo")[: len(own)], own[:2], []), at_once)
    assert spoiled.class_kept is not None
    assert "Everybody looks like the sitter" in (spoiled.refusal() or "")


def test_without_a_reader_only_variety_is_known() -> None:
    plain = scores(None, "ada", photos("ada"))
    assert (plain.likeness, plain.obedience, plain.class_kept) == (None, None, None)
    assert plain.refusal() is None


def test_a_reader_that_is_not_whole_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="reader"):
        load_reader(tmp_path)
