"""The bundled weights, as they are in the repository."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.evaluate import folder_bytes, weights
from training.generate import draw
from training.pipeline import GUIDANCE_RESCALE, open_pipeline
from training.portrait import render
from training.reader import open_reader
from training.sitters import RECIPES, open_sitter, reference_specs
from training.world import ATTRIBUTES, SITTERS

MODELS = Path(__file__).parents[2] / "models"


def test_the_base_draws_a_finite_picture() -> None:
    pipe = open_pipeline(MODELS / "demo")
    assert pipe.scheduler.config["_guidance_rescale"] == GUIDANCE_RESCALE
    picture = draw(pipe, ["photo of a woman as a chef"], steps=2, width=256, height=256)[0]
    assert picture.shape == (256, 256, 3)
    assert picture.std() > 10


@pytest.mark.parametrize("name", RECIPES)
def test_each_sitter_draws_something_else_than_the_base(name: str) -> None:
    prompt = ["photo of sks person as a knight"]
    own = draw(open_sitter(name, MODELS), prompt, steps=2, width=256, height=256)[0]
    base = draw(open_pipeline(MODELS / "demo"), prompt, steps=2, width=256, height=256)[0]
    assert np.abs(own.astype(int) - base).mean() > 1


def test_folders_are_small() -> None:
    assert folder_bytes(MODELS / "demo") <= 36e6
    for name in ("ada", "bo"):
        assert (MODELS / "sitters" / name / "pytorch_lora_weights.safetensors").stat().st_size <= 2e6
    assert (MODELS / "reader" / "reader.safetensors").stat().st_size <= 1.5e6


def test_the_reader_reads_the_sitters_pictures() -> None:
    reader, right = open_reader(MODELS / "reader"), []
    for identity in SITTERS.values():
        specs = reference_specs(identity)
        for spec, reading in zip(specs, reader.read([render(spec, 512) for spec in specs]), strict=True):
            right += [reading[key] == spec.value(key) for key in ATTRIBUTES if spec.shows(key)]
    assert sum(right) / len(right) > 0.97


def test_the_evaluation_is_of_these_weights() -> None:
    report = json.loads((MODELS / "evaluation.json").read_text())
    assert report["sha256"] == weights(MODELS)
    assert {"base_attributes_right", "autoencoder_psnr_512"} <= {figure["name"] for figure in report["figures"]}
