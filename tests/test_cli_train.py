"""`sitter train` as it is typed: from a folder of pictures to a version that draws."""

import asyncio
import os
import re
import shlex
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

import pytest
from PIL import Image
from sqlalchemy import select, update
from typer.testing import CliRunner

from api.cli import app
from api.domain.policy import STATEMENT, STATEMENTS
from api.engine.dreambooth import SAMPLES, SCENES
from api.engine.trainer import Trainer
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import Consent, ModelVersion, Request, now
from tests.domain.test_photos import picture

pytestmark = pytest.mark.usefixtures("wide")

T = TypeVar("T")
LITTLE = ("--width", "256", "--height", "256", "--steps", "2", "--seed", "1")


@pytest.fixture
def folder(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photos of which one is there twice, and a tiny base that draws little; whatever that learns is good."""
    monkeypatch.setenv("USER_MODELS", f'{{"default": "{base_folder}"}}')
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "output"))
    monkeypatch.setenv("HOST_CACHE_GB", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("api.engine.dreambooth.SAMPLE_STEPS", 2)
    monkeypatch.setattr("api.engine.dreambooth.CANDIDATES", (1.0,))
    monkeypatch.setattr("api.engine.dreambooth.SCENES", SCENES[:SAMPLES])
    monkeypatch.setattr("api.engine.judge.LEAST_VARIETY", 0.0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, seed in enumerate((0, 1, 2, 2)):
        picture(seed).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("no photo")
    return photos


def sitter(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stderr


def train(folder: Path, *more: str) -> tuple[int, str]:
    return sitter("train", str(folder), "--name", "eve", "--steps", "2", "--rank", "2", *more)


def trained(folder: Path, *more: str) -> str:
    """What the command says; it has to work."""
    code, said = train(folder, "--consent", *more)
    assert code == 0, said
    return said


def in_database(work: Callable[[Database], Awaitable[T]]) -> T:
    async def opened() -> T:
        database = Database("sqlite:///data/sitter.db")
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(opened())


def rows(table: type[Any]) -> list[Any]:
    """The rows of a table in the order of their ids; columns are there to be read."""

    async def read(database: Database) -> list[Any]:
        async with database.reading() as session:
            return list(await session.scalars(select(table).order_by(table.id)))

    return in_database(read)


def told_line(said: str, command: str) -> list[str]:
    """The words of the line that tells a command."""
    [line] = re.findall(rf"^  sitter ({command} .*)$", said, re.MULTILINE)
    return shlex.split(line)


def draw(said: str) -> str:
    """Draws by the line that was told, and returns what that says."""
    code, drawn = sitter(*told_line(said, "generate"), *LITTLE)
    assert code == 0, drawn
    with Image.open("picture.png") as image:
        assert image.size == (256, 256)
    return drawn


def test_pictures_become_a_version_that_draws(folder: Path, tmp_path: Path) -> None:
    said = trained(folder, "-o", "eve.safetensors")
    assert "3.png: it is the same as another one" in said
    assert "notes.txt: it is no whole JPEG, PNG or WebP" in said
    assert "eve/eve@1 after 2 steps\n" in said
    with Image.open(tmp_path / "eve.png") as sheet:
        assert sheet.width == SAMPLES * sheet.height
    [version] = rows(ModelVersion)
    kept = ModelFolder(tmp_path / "data").weights_of(version.id)
    assert (tmp_path / "eve.safetensors").read_bytes() == kept.read_bytes()
    assert list((tmp_path / "data/trainings").iterdir()) == []
    [consent] = rows(Consent)
    assert consent.granted_by.startswith("cli:")
    assert told_line(said, "generate")[1:] == ["photo of sks person as an astronaut", "--user", "eve"]
    assert "eve/eve@1, seed 1" in draw(said)


def test_said_again_it_tells_the_same_and_trains_nothing(folder: Path, tmp_path: Path) -> None:
    first = trained(folder)
    (tmp_path / "eve.png").unlink()
    again = trained(folder, "-o", "late.safetensors")
    assert "trained already" in again
    assert "--force" in again
    assert told_line(again, "generate") == told_line(first, "generate")
    assert (tmp_path / "eve.png").is_file()
    assert (tmp_path / "late.safetensors").is_file()
    assert len(rows(ModelVersion)) == len(rows(Request)) == 1
    assert "eve/eve@2 after" in trained(folder, "--seed", "1")
    assert "eve/eve@3 after" in trained(folder, "--force")
    older = trained(folder, "--seed", "1")
    assert "trained already" in older
    assert "Another version is published" in older
    assert "eve/eve@2, seed 1" in draw(older)


def test_ctrl_c_keeps_it_and_said_again_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, done = Trainer.step, list[int]()

    def slow(trainer: Trainer) -> float:
        time.sleep(0.1)
        if trainer.done == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", slow)
    code, said = train(folder, "--consent", "--steps", "40")
    assert code == 130
    assert "goes on when you say the same again" in said
    [job] = rows(Request)
    assert (job.status, job.attempt) == ("queued", 1)
    assert len(ModelFolder(Path("data")).photos_of(job.id)) == 3

    def noted(trainer: Trainer) -> float:
        done.append(trainer.done)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", noted)
    assert "was begun before" in trained(folder, "--steps", "40")
    [job] = rows(Request)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert done[0] > 0, "it began anew"
    assert done[-1] == 39
    assert len(rows(ModelVersion)) == 1


def test_what_is_learned_is_what_was_asked_for(folder: Path) -> None:
    words = "--class dog --rank 3 --seed 5 --flip --resolution 256 --train-text-encoder --no-prior-preservation"
    said = trained(folder, *words.split())
    assert 'photo of sks dog as an astronaut"' in said
    [job] = rows(Request)
    asked = {"class_noun": "dog", "steps": 2, "rank": 3, "seed": 5, "flip": True, "resolution": 256}
    asked |= {"train_text_encoder": True, "prior_preservation": False, "keep_pictures": False}
    assert job.parameters.items() >= asked.items()


def test_a_whole_model_is_trained_where_that_is_allowed_and_written_as_an_archive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", str(folder), "--name", "eve", "--steps", "2", "--kind", "full", "--consent")
    code, said = sitter(*words)
    assert (code, "whole models are not trained here" in said, rows(Request)) == (1, True, [])
    monkeypatch.setenv("FULL_TRAINING", "true")
    for wrong in (("-o", "eve.safetensors"), ("--rank", "2")):
        assert sitter(*words, *wrong)[0] in (1, 2)
    code, said = sitter(*words, "-o", "eve.zip")
    assert (code, "eve.zip: the folder of the whole model" in said) == (0, True), said
    with ZipFile("eve.zip") as archive:
        assert {"model_index.json", "unet/config.json", "vae/config.json"} < set(archive.namelist())
        assert not [name for name in archive.namelist() if name.endswith(".png")]
    assert "trained already" in sitter(*words)[1]
    assert "eve/eve@1, seed 1" in draw(said)
    for name, done in (("again.safetensors", 1), ("again.zip", 0)):
        assert sitter("models", "export", "eve", "-o", name)[0] == done
    assert Path("again.zip").read_bytes() == Path("eve.zip").read_bytes()


def test_one_that_came_to_nothing_is_told_and_begun_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "step", lambda trainer: float("nan"))
        code, said = train(folder, "--consent")
    assert code == 1
    assert "the loss is not finite at step" in said
    assert "Try other pictures, fewer steps or another seed." in said
    assert not Path("eve.png").exists()
    assert "eve/eve@1 after" in trained(folder)
    assert [job.status for job in rows(Request)] == ["failed", "succeeded"]


def test_one_that_is_found_wanting_waits_for_a_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.judge.LEAST_VARIETY", 99.0)
    said = trained(folder, "--user", "bob")
    assert "It is not published. All samples look alike: train fewer steps" in said
    assert "bob/eve@1, seed 1" in draw(said)
    assert told_line(said, "models publish") == ["models", "publish", "eve", "1", "--user", "bob"]
    code, published = sitter(*told_line(said, "models publish"))
    assert (code, "bob/eve@1 draws" in published) == (0, True)
    assert "bob/eve@1, seed 1" in draw(trained(folder, "--user", "bob"))


def test_what_was_taken_back_is_trained_anew(folder: Path) -> None:
    trained(folder)
    assert sitter("models", "revoke", "eve")[0] == 0
    said = trained(folder)
    assert "trained already" not in said
    assert "eve/eve@" in draw(said)


def test_what_is_not_there_any_more_is_trained_anew(folder: Path) -> None:
    trained(folder)
    ModelFolder(Path("data")).delete(rows(ModelVersion)[0].id)
    assert "eve/eve@2 after" in trained(folder)


def test_what_was_erased_is_trained_anew(folder: Path) -> None:
    trained(folder)
    assert sitter("models", "erase", "eve", "--yes")[0] == 0
    assert "eve/eve@1, seed 1" in draw(trained(folder))


def test_pictures_of_the_same_name_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    picture(9).save("eve.png")
    mine = (tmp_path / "eve.png").read_bytes()
    assert "eve-1.png: 4 samples" in trained(folder)
    assert (tmp_path / "eve.png").read_bytes() == mine
    assert (tmp_path / "eve-1.png").is_file()
    assert "eve.png: 4 samples" in trained(folder, "--sheet", "eve.png"), "it is named"
    assert (tmp_path / "eve.png").read_bytes() == (tmp_path / "eve-1.png").read_bytes()


def test_pictures_stay_and_a_consent_ends_as_it_is_wished(folder: Path) -> None:
    trained(folder, "--keep-pictures", "--consent-days", "30")
    [job], [consent] = rows(Request), rows(Consent)
    assert len(ModelFolder(Path("data")).photos_of(job.id)) == 3
    assert (consent.expires_at - consent.granted_at).days in (29, 30)

    async def end(database: Database) -> None:
        async with database.transaction() as session:
            await session.execute(update(Consent).values(expires_at=now()))

    in_database(end)
    assert "eve/eve@2 after" in trained(folder, "--keep-pictures", "--consent-days", "30")


def test_a_file_that_cannot_be_written_is_told_and_the_version_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "eve.png").mkdir()
    (tmp_path / "eve-1.png").mkdir()
    code, said = train(folder, "--consent")
    assert code == 1
    assert "eve/eve@1 after" in said
    assert "eve-1.png cannot be written" in said
    assert "Traceback" not in said
    assert "eve/eve@1, seed 1" in draw(trained(folder, "--sheet", "other.png"))


def test_nobody_is_learned_without_consent(folder: Path, tmp_path: Path) -> None:
    code, said = train(folder)
    assert code == 1
    assert STATEMENTS[STATEMENT] in " ".join(said.split())
    assert not (tmp_path / "data").exists()


def test_users_are_those_of_the_database_where_they_sign_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTH", "required")
    code, said = train(folder, "--consent", "--user", "bob")
    assert code == 1
    assert "there is no user bob" in said
    assert "sitter users add bob" in said
    assert rows(Request) == []


def untouched(folder: Path, *more: str) -> str:
    """What is said before anything is done."""
    code, said = train(folder, "--consent", *more)
    assert code in (1, 2)
    assert "Traceback" not in said
    assert not Path("data").exists()
    return said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--name ../eve", "../eve cannot be a model's name"),
        ("--class Person", "Person cannot be what they are"),
        ("--user a/b", "a user id has letters"),
        ("-o photos", "photos cannot be a model's file"),
        ("-o photos/0.png", "photos/0.png cannot be a model's file"),
        ("-o nowhere/eve.safetensors", "there is no folder nowhere"),
        ("--sheet eve.jpg", "eve.jpg cannot be a picture"),
        ("--steps 0", "--steps"),
    ],
)
def test_slips_are_told_before_anything_is_trained(folder: Path, words: str, told: str) -> None:
    assert told in untouched(folder, *words.split())


def test_too_few_pictures_are_told(folder: Path) -> None:
    for number in (0, 1):
        (folder / f"{number}.png").unlink()
    said = untouched(folder)
    assert "notes.txt: it is no whole" in said
    assert "1 picture is good, 3 are the least" in said


def test_a_folder_of_something_else_is_not_read(folder: Path) -> None:
    for number in range(100):
        (folder / f"more{number}.png").touch()
    assert "holds 105 files" in untouched(folder)


def test_a_folder_that_is_not_there_is_told(folder: Path) -> None:
    assert "there is no folder" in untouched(folder / "nowhere")
