"""The last check of a training's photos: one face each, where somebody counts them."""

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio import CapacityLimiter

from api.domain import leftovers, made, trainings
from api.domain.faces import require_faces
from api.domain.generate import Studio
from api.domain.photos import choose
from api.domain.trainings import TrainingOrder
from api.domain.wake import Wake
from api.domain.worker import Worker
from api.engine import dreambooth
from api.engine.dreambooth import SAMPLES, SCENES
from api.model_service import ModelService
from api.store.database import Database
from api.store.models import ModelFolder
from api.store.tables import ModelVersion, Request
from api.store.vault import Vault
from tests import builders
from tests.domain.test_photos import stored
from tests.domain.test_trainings import count, until, working
from tests.jobs import look
from tests.seers import scene

pytestmark = pytest.mark.anyio
Submit = Callable[..., Awaitable[Request]]
NONE, TWO = "it shows no face", "it shows 2 people, not one alone"


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dreambooth, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(dreambooth, "SCENES", SCENES[:SAMPLES])
    monkeypatch.setattr("api.engine.judge.LEAST_VARIETY", 0.0)


@pytest.fixture(scope="module")
def models(base_folder: Path, detector: Path) -> Iterator[ModelService]:
    """A service that counts faces."""
    service = ModelService(builders.settings({"default": builders.source(base_folder)}, face_detector=detector))
    yield service
    service.close()


@pytest.fixture
def submit(
    database: Database, vault: Vault, folder: ModelFolder, wake: Wake, base_folder: Path, tmp_path: Path
) -> Submit:
    """Asks for a training of a picture with so many faces, for each number, after one that is none."""

    async def ask(*faces: int, noun: str = "person") -> Request:
        files = [("notes.txt", b"no picture")]
        files += [(f"{seed}.png", stored(scene(number, 2000 + seed))) for seed, number in enumerate(faces)]
        with folder.collecting() as place:
            chosen = choose(files, place)
            source = builders.source(base_folder)
            order = TrainingOrder("eve", "eve", noun, chosen, source, "owner", steps=1, rank=2)
            job = await trainings.submit(builders.settings(), database, vault, folder, order)
        wake.wake(Wake.QUEUE)
        return job

    return ask


def reasons(job: Request) -> list[str | None]:
    assert job.training is not None
    assert all(one["good"] == (one["reason"] is None) for one in job.training["pictures"])
    return [one["reason"] for one in job.training["pictures"]][1:]


async def test_pictures_of_nobody_and_of_several_are_not_learned(
    submit: Submit, make_worker: Callable[..., Worker], database: Database, wake: Wake, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = list[int]()
    learn = made.make

    def noting(studio: Studio, job: Request, *more: Any) -> Any:
        learned.append(len(studio.folder.photos_of(job.id)))
        return learn(studio, job, *more)

    monkeypatch.setattr(trainings, "make", noting)
    async with working(make_worker()):
        job = await until(database, wake, (await submit(1, 0, 1, 2, 1)).id, "succeeded", "failed")
    assert job.status == "succeeded", job.error_detail
    assert reasons(job) == [None, NONE, None, TWO, None]
    assert learned == [3]


async def test_too_few_pictures_of_one_alone_are_refused_and_nothing_is_kept(
    submit: Submit, make_worker: Callable[..., Worker], database: Database, folder: ModelFolder, wake: Wake
) -> None:
    async with working(make_worker()):
        job = await until(database, wake, (await submit(1, 0, 1, 2)).id, "succeeded", "failed")
    assert (job.status, job.error_code) == ("failed", "invalid_request")
    assert (job.error_detail or "").startswith("2 pictures are good, 3 are the least (notes.txt: ")
    assert f"1.png: {NONE}; 3.png: {TWO}" in (job.error_detail or "")
    assert reasons(job) == [None, NONE, None, TWO]
    assert await count(database, ModelVersion) == 0
    await leftovers.sweep_trainings(folder, database)
    assert folder.trainings() == folder.versions() == {}


async def test_faces_of_what_is_no_person_are_not_looked_for(
    submit: Submit, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker()):
        job = await until(database, wake, (await submit(0, 0, 2, noun="dog")).id, "succeeded", "failed")
    assert (job.status, reasons(job)) == ("succeeded", [None] * 3)


async def test_what_was_looked_at_before_a_crash_is_looked_at_with_the_same_end(
    submit: Submit, studio: Studio, database: Database, folder: ModelFolder
) -> None:
    job = await submit(1, 2, 1, 0, 1)
    known = list[Any]()

    async def written() -> None:
        async with database.transaction() as session:
            (await session.get_one(Request, job.id)).training = {"pictures": known[-1]}

    async def lost() -> None:
        await written()
        raise ConnectionError("killed")

    async def look_at_faces(beat: Callable[[], Awaitable[None]]) -> None:
        now = await look(database, job.id)
        await require_faces(studio, now, known.append, beat, lambda: None, CapacityLimiter(1))

    with pytest.raises(ConnectionError):
        await look_at_faces(lost)
    assert len(folder.photos_of(job.id)) == 5
    for _ in range(2):
        await look_at_faces(written)
        assert [name for name, _ in folder.named_photos_of(job.id)] == ["01.png", "03.png", "05.png"]
        assert reasons(await look(database, job.id)) == [None, TWO, None, NONE, None]
    assert known[0] == known[1] == known[2]


async def test_a_detector_that_does_not_load_ends_the_training(
    submit: Submit,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
    base_folder: Path,
    studio: Studio,
    detector: Path,
    tmp_path: Path,
) -> None:
    broken = builders.copy_of(detector, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    service = ModelService(builders.settings({"default": builders.source(base_folder)}, face_detector=broken))
    try:
        worker = make_worker(Studio(service, studio.pictures, studio.vault, database, studio.folder))
        async with working(worker):
            job = await until(database, wake, (await submit(1, 1, 1)).id, "succeeded", "failed")
    finally:
        service.close()
    assert (job.status, job.error_code, job.error_hint) == ("failed", "model_unavailable", "Check FACE_DETECTOR.")
