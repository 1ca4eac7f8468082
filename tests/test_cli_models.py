"""`sitter models` as it is typed, and `sitter generate` with users' own models."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from sqlalchemy import update
from typer.main import get_command
from typer.testing import CliRunner, Result

from api.cli import app
from api.config import ROOT
from api.engine.adapters import LayerDelta, load_adapter
from api.store.database import Database, migrate
from api.store.models import ModelFolder
from api.store.tables import Model, ModelVersion
from tests import builders
from tests.own import add_model
from tests.people import audited

pytestmark = pytest.mark.usefixtures("wide")

URL = "sqlite:///data/sitter.db"
FOLDER = Path("data")
LITTLE = ("--width", "256", "--height", "256", "--steps", "2", "--seed", "1")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return builders.pipeline()


@pytest.fixture
def eve(tmp_path: Path, base_folder: Path, pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where everybody has the tiny base, and Eve two versions of a model over it; the second draws."""
    monkeypatch.setenv("USER_MODELS", json.dumps(dict.fromkeys(("default", "ada", "bo", "chi"), str(base_folder))))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOST_CACHE_GB", "1")
    monkeypatch.chdir(tmp_path)
    migrate(URL)
    for seed in (1, 2):
        unet = builders.factors(pipeline.unet, builders.UNET_LAYERS, seed=seed)
        file = builders.diffusers_lora(tmp_path / "made.safetensors", unet, {})
        add("eve", "eve", file.read_bytes(), base=str(base_folder))
    return tmp_path


def in_database(work: Callable[[Database], Awaitable[Any]]) -> Any:
    async def opened() -> Any:
        database = Database(URL)
        try:
            return await work(database)
        finally:
            await database.close()

    return asyncio.run(opened())


def add(*given: Any, **more: Any) -> tuple[Model, ModelVersion]:
    made: tuple[Model, ModelVersion] = in_database(
        lambda database: add_model(database, ModelFolder(FOLDER), *given, **more)
    )
    return made


def change_version(number: int, **values: Any) -> None:
    async def work(database: Database) -> None:
        async with database.transaction() as session:
            await session.execute(update(ModelVersion).where(ModelVersion.number == number).values(values))

    in_database(work)


def sitter(*words: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, words, input=typed)


def done(*words: str, typed: str | None = None) -> str:
    """What the command says and prints; it has to work."""
    result = sitter(*words, typed=typed)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: str) -> str:
    """What the command says; it has to fail with a sentence."""
    result = sitter(*words)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.stderr


def row(*cells: str) -> str:
    """A pattern for a line of a table."""
    return r"\W+".join(map(re.escape, cells))


def drawn(*words: str) -> tuple[str, bytes]:
    """What drawing says, and the picture."""
    said = done("generate", "photo of sks person", *words, *LITTLE)
    return said, Path("picture.png").read_bytes()


def test_models_are_listed_with_what_draws(eve: Path, base_folder: Path) -> None:
    add("bob", "dog", base=str(base_folder), published=False)
    everybody = done("models", "list")
    assert re.search(row("eve", "eve", "2", "2", "ready", "sks person", "20"), everybody)
    assert re.search(row("bob", "dog", "1", "unpublished", "sks person"), everybody)
    assert re.search(row("ada", "default", "configured"), everybody)
    bobs = done("models", "list", "--user", "bob")
    assert "dog" in bobs
    assert "eve" not in bobs


def test_versions_are_listed_newest_first(eve: Path) -> None:
    change_version(1, scores={"likeness": 0.5, "obedience": 1.0, "class_kept": None}, refusal="They look alike.")
    listed = done("models", "versions", "eve")
    newer, older = re.search(row("2", "yes", "lora", "1"), listed), re.search(row("1", "lora", "1", "0.50"), listed)
    assert newer
    assert older
    assert newer.start() < older.start()
    assert "eve/eve@1: They look alike." in listed


def test_versions_are_published_and_rolled_back(eve: Path) -> None:
    assert "eve/eve@1 draws again" in done("models", "rollback", "eve")
    assert "eve/eve@1, seed 1" in drawn("--user", "eve")[0]
    assert "no good version before eve/eve@1" in refused("models", "rollback", "eve")
    assert "eve/eve@2 draws from now on" in done("models", "publish", "eve", "2")
    assert "eve/eve@2, seed 1" in drawn("--user", "eve")[0]
    nobody = refused("models", "publish", "eve", "3")
    assert "no version 3" in nobody
    assert "sitter models versions eve" in nobody
    lines = in_database(audited)
    assert [action for _, action, _ in lines] == ["model.published", "model.published"]
    assert all(actor.startswith("cli:") for actor, _, _ in lines)


def test_nobody_rolls_back_to_what_was_found_wanting(eve: Path, base_folder: Path) -> None:
    add("eve", "eve", base=str(base_folder))
    change_version(2, refusal="They look alike.")
    assert "eve/eve@1 draws again" in done("models", "rollback", "eve")


def test_nothing_published_is_nothing_to_roll_back(eve: Path) -> None:
    add("bob", "bob", published=False)
    assert "no version of bob/bob is published" in refused("models", "rollback", "bob")
    assert "no version of this model is published" in refused("models", "export", "bob", "-o", "x.safetensors")


def changes(pipeline: StableDiffusionPipeline, file: str) -> dict[str, torch.Tensor]:
    """What a LoRA changes in each layer of the tiny base."""
    deltas = [delta for delta in load_adapter(Path(file), pipeline, 1.0).deltas if isinstance(delta, LayerDelta)]
    return {
        delta.layer: delta.merged(torch.zeros_like(pipeline.unet.get_submodule(delta.layer).weight)) for delta in deltas
    }


def test_versions_are_taken_along_in_both_forms(eve: Path, pipeline: StableDiffusionPipeline) -> None:
    assert "newest.safetensors: eve/eve@2" in done("models", "export", "eve", "-o", "newest.safetensors")
    assert "for A1111" not in done("models", "export", "eve", "--version", "1", "-o", "first.safetensors")
    assert "eve/eve@1, with kohya" in done(
        "models", "export", "eve", "--version", "1", "--kohya", "-o", "k.safetensors"
    )
    assert Path("newest.safetensors").read_bytes() == Path("made.safetensors").read_bytes()
    assert b"lora_unet_" in Path("k.safetensors").read_bytes()
    first, kohya, newest = (changes(pipeline, f"{name}.safetensors") for name in ("first", "k", "newest"))
    assert set(first) == set(kohya) == set(builders.UNET_LAYERS)
    for layer, change in first.items():
        torch.testing.assert_close(kohya[layer], change)
        assert not torch.allclose(newest[layer], change)
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_what_cannot_be_taken_along_is_told(eve: Path) -> None:
    assert "cannot be a model's file" in refused("models", "export", "eve", "-o", "eve.bin")
    assert "no folder nowhere" in refused("models", "export", "eve", "-o", "nowhere/eve.safetensors")
    assert "no version 3" in refused("models", "export", "eve", "--version", "3", "-o", "x.safetensors")
    add("bob", "bob", b"no LoRA")
    assert "this model has no such form" in refused("models", "export", "bob", "--kohya", "-o", "x.safetensors")
    assert not Path("x.safetensors").exists()


def test_users_draw_with_their_own_models(eve: Path, base_folder: Path) -> None:
    base, newest = drawn("--user", "ada"), drawn("--user", "eve")
    first = drawn("--user", "eve", "--model", "eve", "--model-version", "1")
    assert f"{base_folder}, seed 1" in base[0]
    assert "eve/eve@2, seed 1" in newest[0]
    assert "eve/eve@1, seed 1" in first[0]
    assert len({picture for _, picture in (base, newest, first)}) == 3
    assert drawn("--user", "eve", "--model", "default")[1] == base[1]
    stranger = drawn("--user", "evee")
    assert "evee has no model that draws: the default's drew." in stranger[0]
    assert stranger[1] == base[1]


def test_models_that_are_not_there_do_not_draw(eve: Path) -> None:
    for words in (("--model", "dog"), ("--model", "eve", "--model-version", "3")):
        assert "sitter models list --user eve" in refused("generate", "x", "--user", "eve", *words)
    assert "no model eve" in refused("generate", "x", "--user", "bob", "--model", "eve")
    assert sitter("generate", "x", "--user", "eve", "--model-version", "1").exit_code == 2
    assert not Path("picture.png").exists()


def test_fast_goes_by_the_base_of_ones_own_model(
    eve: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER_MODELS", json.dumps({"default": str(tmp_path / "elsewhere")}))
    monkeypatch.setenv("FAST_MODELS", json.dumps({str(base_folder): {"scheduler": "lcm"}}))
    said = done("generate", "x", "--user", "eve", "--preset", "fast", *LITTLE)
    assert "eve/eve@2" in said
    assert "no preset fast" in refused("generate", "x", "--user", "bob", "--preset", "fast")


def test_a_consent_is_taken_back(eve: Path, base_folder: Path) -> None:
    assert "Nobody draws with eve/eve any more" in done("models", "revoke", "eve")
    assert ModelFolder(FOLDER).versions() == {}
    assert re.search(r"eve\W+eve\W.*\Wrevoked", done("models", "list"))
    assert f"{base_folder}, seed 1" in drawn("--user", "eve")[0]
    for words in ("generate x --user eve --model eve", "models publish eve 1", "models export eve -o x.safetensors"):
        assert refused(*words.split())
    assert not Path("x.safetensors").exists()
    [(actor, action, _)] = in_database(audited)
    assert (actor[:4], action) == ("cli:", "consent.revoked")


def test_a_model_is_erased_once_that_is_said_twice(eve: Path) -> None:
    assert sitter("models", "erase", "eve", typed="n\n").exit_code == 1
    assert sitter("models", "erase", "eve", typed="").exit_code == 1
    assert len(ModelFolder(FOLDER).versions()) == 2
    said = done("models", "erase", "eve", typed="y\n")
    assert "Erase eve/eve with 2 versions, for good?" in said
    assert "eve/eve is erased" in said
    assert ModelFolder(FOLDER).versions() == {}
    assert "eve has no model eve" in refused("models", "versions", "eve")
    add("bob", "dog")
    assert "Erase" not in done("models", "erase", "dog", "--user", "bob", "--yes")


def test_models_are_their_namesakes_where_nobody_else_is_named(eve: Path) -> None:
    model, _ = add("bob", "eve")
    done("models", "revoke", "eve", "--user", "bob")
    lines = in_database(audited)
    assert lines[-1][2] == f"model:{model.id}"
    assert re.search(row("eve", "eve", "2", "2", "ready"), done("models", "list"))
    assert "Say --user" in refused("models", "versions", "dog")
    assert "bob has no model dog" in refused("models", "revoke", "dog", "--user", "bob")


def test_they_are_looked_after_without_torch(eve: Path) -> None:
    program = """if True:
        import sys
        from api.cli import app
        for words in ("list", "versions eve", "publish eve 1", "export eve -o x.safetensors", "revoke eve"):
            app(["models", *words.split()], standalone_mode=False)
        print("torch" in sys.modules)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert Path("x.safetensors").is_file()
    assert ended.stdout.split()[-1] == "False"


def test_what_is_in_memory_is_the_running_servers(eve: Path) -> None:
    assert "No Sitter answers" in refused("cache", "--address", "http://127.0.0.1:9")


def test_help_shows_what_is_taken_where_nothing_is_said() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = [commands[name] for name in ("generate", "train", "cache")] + list(commands["models"].commands.values())
    for option in [option for command in shown for option in command.params]:
        assert not re.search(r"\[[a-z#/@]", getattr(option, "help", None) or ""), "rich takes that for a colour"
