from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from api.cli import app
from api.engine.dreambooth import SAMPLES, SCENES
from tests.domain.test_photos import picture

run = CliRunner().invoke


@pytest.fixture
def folder(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photos of which one is there twice, and a tiny base that draws little."""
    monkeypatch.setenv("USER_MODELS", f'{{"default": "{base_folder}"}}')
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("api.engine.dreambooth.SAMPLE_STEPS", 2)
    monkeypatch.setattr("api.engine.dreambooth.SCENES", SCENES[:SAMPLES])
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, seed in enumerate((0, 1, 2, 2)):
        picture(seed).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("no photo")
    return photos


def train(folder: Path, *more: str) -> tuple[int, str]:
    done = run(app, ["train", str(folder), "--name", "eve", "--steps", "2", "--rank", "2", *more])
    return done.exit_code, done.stderr


def test_six_pictures_become_a_model(folder: Path, tmp_path: Path) -> None:
    code, said = train(folder, "--consent")
    assert code == 0, said
    assert "3.png: it is the same as another one" in said
    assert "notes.txt: it is no whole JPEG, PNG or WebP" in said
    file = tmp_path / "data/loras/eve.safetensors"
    assert file.is_file()
    assert f"lora: {file}" in said.replace("\n", "")
    with Image.open(file.with_suffix(".png")) as sheet:
        assert sheet.width == SAMPLES * sheet.height
    assert sorted(path.name for path in file.parent.iterdir()) == ["eve.png", "eve.safetensors"]
    assert list((tmp_path / "data/trainings").iterdir()) == []
    code, said = train(folder, "--consent")
    assert code == 1
    assert "is there already" in said
    assert train(folder, "--consent", "--force")[0] == 0


def test_nobody_is_learned_without_consent(folder: Path, tmp_path: Path) -> None:
    code, said = train(folder)
    assert code == 1
    assert "consent" in said
    assert not (tmp_path / "data").exists()


def test_too_few_pictures_are_told(folder: Path) -> None:
    for number in (0, 1):
        (folder / f"{number}.png").unlink()
    code, said = train(folder, "--consent")
    assert code == 1
    assert "1 pictures are good, 3 are the least" in said


def test_names_and_files_that_cannot_be_are_told_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    done = run(app, ["train", str(folder), "--name", "../eve", "--consent"])
    assert (done.exit_code, "cannot be a model's name" in done.stderr) == (1, True)
    for output in (tmp_path, folder / "0.png"):
        code, said = train(folder, "--consent", "-o", str(output))
        assert (code, "cannotbeamodel'sfile" in "".join(said.split())) == (1, True)
    assert (folder / "0.png").is_file()


def test_a_folder_that_is_not_there_is_told(folder: Path) -> None:
    code, said = train(folder / "nowhere", "--consent")
    assert code == 1
    assert "there is no folder" in said
