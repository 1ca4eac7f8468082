"""The judge that asks an image encoder: what its scores mean, and that what is alike scores higher."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from api.config import ROOT
from api.engine.encoder import Embedded, ImageEncoder, load_encoder, measures
from api.engine.judge import Scores, Shown, judge
from api.errors import ModelUnavailable
from tests import builders
from tests.engine.test_judge import at_once, photos

PROMPTS = ["photo of a person as a knight", "photo of a person on a beach", "a cat", "photo of a king in space"]


@pytest.fixture(scope="module")
def loaded(encoder: Path) -> ImageEncoder:
    return load_encoder(encoder, "cpu")


def turned(*degrees: float) -> Tensor:
    """Directions in a plane, one for each angle."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


# Photos 10 degrees from each other, the base's pictures a quarter away; prompts like the base's pictures.
OF = Embedded(turned(0, 10), turned(20, 30), turned(80, 100), turned(80, 100), turned(80, 100))


def test_likeness_is_how_far_it_is_from_anybody_to_the_photos() -> None:
    anybody = (cosine(80) + cosine(70) + cosine(100) + cosine(90)) / 4
    samples = (cosine(20) + cosine(10) + cosine(30) + cosine(20)) / 4
    likeness, _, _ = measures(OF)
    assert likeness == pytest.approx((samples - anybody) / (cosine(10) - anybody), abs=1e-5)
    assert measures(replace(OF, samples=OF.photos))[0] == 1.0
    assert measures(replace(OF, samples=OF.of_base))[0] == 0.0
    assert measures(replace(OF, samples=turned(170, 180)))[0] == 0.0  # farther than anybody
    assert measures(replace(OF, of_base=OF.photos))[0] is None  # the photos are not alike more than anybody is


def test_obedience_is_how_much_closer_to_its_own_prompt_over_the_bases() -> None:
    assert measures(replace(OF, samples=OF.of_base))[1] == pytest.approx(1.0, abs=1e-5)
    assert measures(replace(OF, samples=OF.of_base.flip(0)))[1] == 0.0  # each shows what another was asked for
    assert measures(replace(OF, samples=turned(90, 90)))[1] == pytest.approx(0.0, abs=1e-5)  # all show the same
    half = measures(replace(OF, samples=turned(85, 95)))[1]
    expected = (cosine(5) - cosine(15)) / (1 - cosine(20))
    assert half == pytest.approx(expected, abs=1e-5)
    assert measures(replace(OF, prompts=turned(90, 90)))[1] is None  # the base shows none of it either


def test_the_class_is_kept_as_far_as_it_is_from_the_sitter() -> None:
    assert measures(OF)[2] == pytest.approx(1.0, abs=1e-5)
    assert measures(replace(OF, of_class=OF.samples))[2] == pytest.approx(0.0, abs=1e-5)
    between = measures(replace(OF, of_class=turned(50)))[2]
    assert between == pytest.approx((cosine(30) - cosine(60)) / (1 - cosine(60)), abs=1e-5)
    assert measures(replace(OF, samples=OF.of_base))[2] is None  # nothing was learned at all


def scores(by: ImageEncoder, samples: Sequence[Image.Image], of_class: Sequence[Image.Image]) -> Scores:
    return judge(by, Shown(photos("ada"), samples, photos("chi")[:4], of_class, PROMPTS), at_once)


def test_pictures_that_are_the_sitters_score_higher_than_anybodys(loaded: ImageEncoder) -> None:
    before = photos("chi")[:2]
    own, half = (
        scores(loaded, photos("ada")[:4], before),
        scores(loaded, photos("ada")[:2] + photos("chi")[2:4], before),
    )
    nobody = scores(loaded, photos("chi")[:4], before)
    assert own.likeness == 1.0
    assert half.likeness is not None
    assert 0.2 < half.likeness < 0.8
    assert (nobody.likeness, nobody.class_kept) == (0.0, None)
    assert nobody.obedience == pytest.approx(1.0, abs=1e-4)
    assert own.class_kept == pytest.approx(1.0, abs=1e-4)
    spoiled = scores(loaded, photos("ada")[:4], photos("ada")[:2])
    assert spoiled.class_kept == pytest.approx(0.0, abs=1e-4)


def test_embeddings_are_those_of_the_library(loaded: ImageEncoder) -> None:
    picture, model = photos("ada")[0], loaded.model
    with torch.no_grad():
        image = loaded.processor(images=picture, return_tensors="pt")
        words = loaded.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        whole = model(**image, **words)
    assert loaded.of_picture(picture).shape == (1, 32)
    assert torch.allclose(loaded.of_picture(picture), whole.image_embeds, atol=1e-5)
    assert torch.allclose(loaded.of_words(PROMPTS), whole.text_embeds, atol=1e-5)
    assert loaded.of_words(["word " * 500]).shape == (1, 32)  # longer than it reads


@pytest.mark.parametrize(
    ("likeness", "obedience", "kept", "said"),
    [
        (0.24, 1.0, 1.0, "do not look like the pictures"),
        (0.26, 0.49, 1.0, "what was asked for"),
        (0.26, 0.51, 0.49, "Everybody looks like the sitter"),
        (0.26, 0.51, 0.51, None),
        (None, None, None, None),
    ],
)
def test_what_it_asks_for_is_on_its_own_scale(
    likeness: float | None, obedience: float | None, kept: float | None, said: str | None
) -> None:
    refusal = Scores(likeness, obedience, kept, 1.0, ImageEncoder.least).refusal()
    assert refusal is None if said is None else said in (refusal or "")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("spoil", [no_weights, cut_short, no_tokenizer, no_processor])
def test_a_folder_that_is_not_whole_is_told(encoder: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder := builders.copy_of(encoder, tmp_path / "spoiled"))
    with pytest.raises(ModelUnavailable) as caught:
        load_encoder(folder, "cpu")
    assert "spoiled" in caught.value.detail
    assert caught.value.hint == "Check JUDGE_ENCODER."


def test_a_model_of_another_kind_is_told(detector: Path) -> None:
    for folder in (detector, ROOT / "models" / "reader"):
        with pytest.raises(ModelUnavailable, match="is no CLIP model"):
            load_encoder(folder, "cpu")
