import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from api import cli_delta
from api.cli import app
from api.engine.deltas import read_delta
from api.schemas import GenerateRequest
from tests import builders

pytestmark = pytest.mark.usefixtures("wide")

SMALL = GenerateRequest(prompt="photo of sks person", width=256, height=256, num_inference_steps=2, seed=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    builders.finetuned(builders.pipeline(), 2).save_pretrained(tmp_path / "eva")
    return tmp_path / "eva"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path, base_folder: Path) -> None:
    users = {"eva": str(checkpoint), "bo": {"base": str(base_folder), "lora": "x.safetensors"}}
    monkeypatch.setenv("USER_MODELS", json.dumps(users))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOST_CACHE_GB", "1")
    monkeypatch.setattr(cli_delta, "_drawing", lambda prompt, seed: SMALL)
    monkeypatch.setattr(cli_delta, "PROMPTS", ("one",))


def sitter(*words: str) -> Result:
    return CliRunner().invoke(app, ["delta", *words])


def test_a_delta_of_enough_rank_may_stand_for_its_checkpoint(tmp_path: Path, base_folder: Path) -> None:
    done = sitter("eva", "--base", str(base_folder), "--rank", "2")
    assert done.exit_code == 0, done.stderr
    file = tmp_path / "data" / "deltas" / "eva.safetensors"
    made = read_delta(file)
    assert made.passed
    assert (made.base, made.rank, len(made.psnr)) == (str(base_folder), 2, 1)
    assert f"delta: {file}" in done.stderr
    assert sitter("eva", "--base", str(base_folder), "--rank", "1").exit_code == 1
    assert read_delta(file) == made  # what passed stays
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_one_of_too_low_a_rank_may_not_and_says_so(tmp_path: Path, base_folder: Path) -> None:
    done = sitter("eva", "--base", str(base_folder), "--rank", "1", "-o", str(tmp_path / "low.safetensors"))
    assert done.exit_code == 1
    assert "higher --rank" in done.stderr
    assert not (tmp_path / "low.safetensors").exists()


def test_only_whole_models_have_deltas(base_folder: Path) -> None:
    done = sitter("bo", "--base", str(base_folder))
    assert done.exit_code == 1
    assert "bo has a LoRA" in done.stderr
    assert "nobody has no model" in sitter("nobody", "--base", str(base_folder)).stderr


def test_its_help_says_what_it_draws_with() -> None:
    words = sitter("--help").stdout.replace("│", " ").split()
    assert "[of `sks person`]" in " ".join(words)
