"""Models that users send: what is good draws, what is not leaves nothing."""

import io
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from api.config import Settings
from api.domain import uploads
from api.domain.models import own_models
from api.domain.uploads import Place, UploadOrder, placed, unpacked
from api.engine.checkup import Checked
from api.errors import InvalidRequest, LimitReached, NotFound, StorageFull
from api.model_service import ModelService
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import Consent, Model, ModelVersion
from tests import builders
from tests.people import audited

pytestmark = pytest.mark.anyio
Send = Callable[..., Awaitable[str]]


@pytest.fixture
def lora(tmp_path: Path) -> bytes:
    """A LoRA for the tiny base."""
    pipeline = builders.pipeline()
    unet = builders.factors(pipeline.unet, builders.UNET_LAYERS)
    text = builders.factors(pipeline.text_encoder, builders.TEXT_LAYERS)
    return builders.diffusers_lora(tmp_path / "given.safetensors", unet, text).read_bytes()


@pytest.fixture
def send(database: Database, folder: ModelFolder, models: ModelService, base_folder: Path) -> Send:
    """Sends a model of Eve's."""

    async def ask(place: Place, settings: Settings | None = None, **fields: Any) -> str:
        asked = {"user_id": "eve", "name": "eve", "class_noun": "person", "granted_by": "eve"}
        order = UploadOrder(**{**asked, "source": builders.source(base_folder), **fields})
        return await uploads.receive(settings or builders.settings(), database, folder, models, order, place)

    return ask


async def versions(database: Database) -> list[ModelVersion]:
    async with database.reading() as session:
        return list(await session.scalars(select(ModelVersion).order_by(ModelVersion.number)))


def archive(**files: bytes) -> io.BytesIO:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return packed


async def test_a_lora_that_was_sent_draws(
    send: Send, lora: bytes, database: Database, folder: ModelFolder, models: ModelService
) -> None:
    await send(placed("mine.safetensors", io.BytesIO(lora)))
    (version,) = await versions(database)
    assert (version.kind, version.number, version.bytes) == ("lora", 1, len(lora))
    own = await own_models(database, folder, "eve", [(version.id, 1.0)])
    drawn = models.generate(builders.request(user_id="eve"), own=own)
    assert (drawn.model_id, drawn.version_hash) == ("eve/eve@1", version.sha256)
    assert drawn.pngs != models.generate(builders.request(user_id="eve2")).pngs
    with pytest.raises(NotFound):
        models.generate(builders.request(user_id="bo"), own=own)
    assert ("eve", "model.uploaded", f"model:{version.model_id}") in await audited(database)


async def test_a_whole_model_that_was_sent_draws(
    send: Send, database: Database, folder: ModelFolder, models: ModelService, tmp_path: Path
) -> None:
    other = builders.save_pipeline(tmp_path / "other", seed=5)
    files = {str(file.relative_to(other)): file.read_bytes() for file in other.rglob("*") if file.is_file()}
    await send(unpacked(archive(**{f"around/{name}": content for name, content in files.items()})))
    (version,) = await versions(database)
    assert (version.kind, version.files.keys()) == ("full", files.keys())
    own = await own_models(database, folder, "eve", [(version.id, 1.0)])
    drawn = models.generate(builders.request(user_id="eve"), own=own)
    service = ModelService(builders.settings({"default": builders.source(other)}))
    assert drawn.pngs == service.generate(builders.request()).pngs
    service.close()


async def test_a_folder_as_peft_writes_it_draws(
    send: Send, database: Database, folder: ModelFolder, models: ModelService, tmp_path: Path
) -> None:
    made = builders.peft_lora(tmp_path / "peft", builders.pipeline().unet, ["to_q"])
    files = {file.name: file.read_bytes() for file in made.iterdir() if file.name != "README.md"}
    await send(unpacked(archive(**files)))
    (version,) = await versions(database)
    own = await own_models(database, folder, "eve", [(version.id, 1.0)])
    assert models.generate(builders.request(user_id="eve"), own=own).version_hash == version.sha256


async def test_the_same_again_is_the_same_version(
    send: Send, lora: bytes, database: Database, folder: ModelFolder
) -> None:
    first = await send(placed("a.safetensors", io.BytesIO(lora)))
    assert await send(placed("b.safetensors", io.BytesIO(lora))) == first
    (version,) = await versions(database)
    assert folder.versions().keys() == {version.id}


async def test_what_is_no_model_leaves_nothing(send: Send, database: Database, folder: ModelFolder) -> None:
    with pytest.raises(InvalidRequest, match="not a safetensors file"):
        await send(placed("x.safetensors", io.BytesIO(b"\x80\x05]q\x00.")))
    assert folder.versions() == {}
    async with database.reading() as session:
        counts = [await session.scalar(select(func.count()).select_from(table)) for table in (Model, Consent)]
    assert counts == [0, 0]


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/b/c.json", ".hidden", "unet/../../x.json"])
def test_an_archive_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    part = tmp_path / "around" / "part"
    part.mkdir(parents=True)
    with pytest.raises(InvalidRequest):
        unpacked(archive(**{name: b"{}", "model_index.json": b"{}"}))(part)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_an_archive_that_unpacks_to_more_than_is_taken_is_refused(
    send: Send, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BYTES", 1000)
    with pytest.raises(InvalidRequest, match="over 1,000 bytes"):
        await send(unpacked(archive(**{"model_index.json": b" " * 2000})))
    assert folder.versions() == {}


def test_other_files_than_safetensors_are_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match=r"one \.safetensors"):
        placed("model.ckpt", io.BytesIO(b""))


async def test_a_user_keeps_so_much_and_no_more(
    send: Send, database: Database, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "check_upload", lambda path, source: Checked("lora", 1, 1, path.stat().st_size))
    settings = builders.settings(limit_models_gb=2500 / 1e9)
    await send(placed("a.safetensors", io.BytesIO(b"a" * 2000)), settings)
    with pytest.raises(LimitReached):
        await send(placed("a.safetensors", io.BytesIO(b"b" * 2000)), settings)
    await send(placed("a.safetensors", io.BytesIO(b"b" * 2000)), settings, user_id="bo")
    assert len(folder.versions()) == len(await versions(database)) == 2


async def test_a_full_disk_leaves_nothing(send: Send, folder: ModelFolder) -> None:
    def full(part: Path) -> None:
        (part / "some").write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageFull):
        await send(full)
    assert folder.versions() == {}
