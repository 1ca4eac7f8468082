"""A training from its photos to a model that draws, and all that ends it earlier."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from api.config import Settings
from api.domain import jobs, leftovers, registry, trainings
from api.domain.accounts import ALL_SCOPES, Caller
from api.domain.crashes import crashed
from api.domain.generate import Studio
from api.domain.models import own_models
from api.domain.photos import choose
from api.domain.policy import ConsentMissing
from api.domain.registry import Registry
from api.domain.submit import Desk, Order
from api.domain.trainings import TrainingOrder
from api.domain.wake import Wake
from api.domain.worker import BEAT, Worker
from api.engine import dreambooth
from api.engine.dreambooth import SAMPLES, SCENES
from api.engine.trainer import Trainer
from api.errors import (
    DatabaseUnavailable,
    Forbidden,
    InvalidRequest,
    KeyReused,
    LimitReached,
    ModelUnavailable,
    NotFound,
    StorageFull,
)
from api.store.database import Database
from api.store.models import WEIGHTS, ModelFolder, sha256
from api.store.tables import Consent, Image, Model, ModelVersion, Request, User, now
from api.store.vault import Vault
from tests import builders
from tests.domain.test_photos import picture, stored
from tests.jobs import enqueue, look, take, taken
from tests.own import add_model
from tests.people import audited

pytestmark = pytest.mark.anyio
PATIENCE = 120  # seconds until a job that never ends fails the test
STEPS = 4
LONG = 4000
EVE = Caller("eve", False, ALL_SCOPES, "key")
Submit = Callable[..., Awaitable[Request]]


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples of few steps; whatever the tiny base learns is good."""
    monkeypatch.setattr(dreambooth, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(dreambooth, "SCENES", SCENES[:SAMPLES])
    monkeypatch.setattr("api.engine.judge.LEAST_VARIETY", 0.0)


@pytest.fixture
def settings() -> Settings:
    return builders.settings()


@pytest.fixture
def submit(
    settings: Settings,
    database: Database,
    vault: Vault,
    folder: ModelFolder,
    wake: Wake,
    base_folder: Path,
    tmp_path: Path,
) -> Submit:
    """Asks for a training of Eve."""
    place = tmp_path / "photos"
    place.mkdir()
    chosen = choose(((f"{seed}.png", stored(picture(seed))) for seed in range(3)), place)
    asked = TrainingOrder("eve", "eve", "person", chosen, builders.source(base_folder), "owner", steps=STEPS, rank=2)

    async def ask(*, allowed: bool = False, **fields: Any) -> Request:
        now_set = builders.settings(full_training=True) if allowed else settings
        job = await trainings.submit(now_set, database, vault, folder, replace(asked, **fields))
        wake.wake(Wake.QUEUE)
        return job

    return ask


@pytest.fixture
def own(settings: Settings, database: Database, studio: Studio, wake: Wake) -> Registry:
    return Registry(settings, database, studio.folder, studio.models, wake)


@asynccontextmanager
async def working(worker: Worker, slots: int = 2) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run(slots))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(database: Database, wake: Wake, job_id: str, *statuses: str, step: int = 0) -> Request:
    async with asyncio.timeout(PATIENCE):
        while True:
            job = await look(database, job_id)
            if job.status in statuses and job.step >= step:
                return job
            await wake.wait(job_id, 0.05)


async def count(database: Database, table: type[Any]) -> int:
    async with database.reading() as session:
        return await session.scalar(select(func.count()).select_from(table)) or 0


async def version_of(database: Database) -> ModelVersion:
    async with database.reading() as session:
        return (await session.scalars(select(ModelVersion))).one()


async def test_photos_become_a_model_that_draws(
    submit: Submit, desk: Desk, make_worker: Callable[..., Worker], database: Database, folder: ModelFolder, wake: Wake
) -> None:
    worker = make_worker()
    async with working(worker):
        job = await until(database, wake, (await submit()).id, "succeeded", "failed")
        assert job.status == "succeeded", job.error_detail
        drawing = await desk.submit(Order(builders.request(user_id="eve"), "eve"))
        drawn = await until(database, wake, drawing.id, "succeeded", "failed")
    version = await version_of(database)
    assert (job.model_id, drawn.model_id, drawn.versions) == ("eve/eve@1", "eve/eve@1", [[version.id, 1.0]])
    assert drawn.cache_hit, "it was loaded already"
    assert version.sha256 == sha256(folder.weights_of(version.id).read_bytes())
    assert version.files.keys() == {WEIGHTS, *(f"sample-{number}.png" for number in range(1, SAMPLES + 1))}
    assert version.parameters["rank"] == 2
    assert folder.trainings() == {job.id: pytest.approx(0, abs=PATIENCE)}
    assert await leftovers.sweep_trainings(folder, database) == 1
    assert folder.trainings() == {}
    assert job.training is not None
    assert [step for step, _ in job.training["losses"]] == [1, 2, 3, 4]
    async with database.reading() as session:
        image = (await session.scalars(select(Image))).one()
    assert (image.version_hash, image.base_hash) == (version.sha256, version.base_hash)


async def test_a_whole_model_is_trained_where_the_operator_lets_it(
    submit: Submit,
    own: Registry,
    settings: Settings,
    desk: Desk,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
) -> None:
    """It draws by itself, is taken along whole, and goes like any other."""
    with pytest.raises(Forbidden, match="whole models are not trained here"):
        await submit(kind="full", rank=None)
    assert (own.folder.trainings(), await count(database, Model)) == ({}, 0)
    async with working(make_worker()):
        job = await submit(allowed=True, kind="full", rank=None)
        job = await until(database, wake, job.id, "succeeded", "failed")
        assert job.status == "succeeded", job.error_detail
        drawing = await desk.submit(Order(builders.request(user_id="eve"), "eve"))
        drawn = await until(database, wake, drawing.id, "succeeded", "failed")
    version = await version_of(database)
    assert (version.kind, version.parameters["rank"], drawn.lane, drawn.cache_hit) == ("full", None, "exact", True)
    kept = await registry.weights_of(own, EVE, version.model_id)
    samples = {f"sample-{number}.png" for number in range(1, SAMPLES + 1)}
    assert version.files.keys() == kept.files.keys() | samples
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= set(
        kept.files
    )
    assert {name: sha256(path) for name, path in kept.files.items()}.items() <= version.files.items()
    in_folder = [path for path in kept.files["model_index.json"].parent.rglob("*") if path.is_file()]
    assert version.bytes == sum(path.stat().st_size for path in in_folder)
    assert {path.stat().st_mode & 0o777 for path in in_folder} == {0o600}
    assert (kept.sha256, kept.file) == (version.sha256, None)
    (described,) = await registry.versions(own, EVE, version.model_id)
    assert {path.rsplit("/", 1)[1] for path in described.samples} == samples
    await registry.erase(own, EVE, version.model_id)
    assert version.id not in [getattr(source, "version_id", None) for source in own.models.cache.loaded()]
    assert own.folder.versions() == {}


async def test_who_keeps_more_than_one_may_trains_no_more(
    submit: Submit, own: Registry, settings: Settings, database: Database
) -> None:
    await add_model(database, own.folder, "eve", "other", b"x" * 2000)
    async with database.transaction() as session:
        (await session.scalars(select(ModelVersion))).one().bytes = int(settings.limit_models_gb * 1e9) + 1
    with pytest.raises(LimitReached, match="may be kept"):
        await submit()
    assert own.folder.trainings() == {}


async def test_photos_stay_where_their_owner_wished_so(
    submit: Submit, own: Registry, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker()):
        job = await until(database, wake, (await submit(keep_pictures=True)).id, "succeeded")
    await leftovers.sweep_trainings(own.folder, database)
    assert len(own.folder.photos_of(job.id)) == 3
    async with database.reading() as session:
        model = (await session.scalars(select(Model))).one()
    await registry.erase(own, EVE, model.id)
    assert own.folder.trainings() == own.folder.versions() == {}


async def test_a_training_that_is_asked_for_twice_is_one(
    submit: Submit, database: Database, folder: ModelFolder
) -> None:
    first = await submit(idempotency_key="once")
    assert (await submit(idempotency_key="once")).id == first.id
    assert folder.trainings().keys() == {first.id}
    with pytest.raises(KeyReused):
        await submit(idempotency_key="once", steps=5)
    assert await count(database, Consent) == 1


async def test_what_is_refused_leaves_nothing(
    submit: Submit, database: Database, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit()
    with pytest.raises(InvalidRequest, match="not of a dog"):
        await submit(class_noun="dog")
    assert len(folder.trainings()) == await count(database, Request) == 1

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("api.store.models.write_whole", full)
    with pytest.raises(StorageFull):
        await submit(name="other")
    assert len(folder.trainings()) == await count(database, Request) == 1


async def test_a_users_queue_is_as_long_for_trainings(settings: Settings, submit: Submit, database: Database) -> None:
    for number in range(2):
        await submit(name=f"eve{number}")
    async with database.transaction() as session:
        (await session.get_one(User, "eve")).limits = {"queued": 2}
    with pytest.raises(LimitReached, match="queued"):
        await submit(name="more")
    async with database.transaction() as session:
        (await session.get_one(User, "eve")).limits = {}
    for number in range(2, settings.limit_trainings):
        await submit(name=f"eve{number}")
    with pytest.raises(LimitReached, match="trainings"):
        await submit(name="more")
    await submit(user_id="bo")


async def test_of_two_trainings_of_a_model_the_second_waits(submit: Submit, database: Database) -> None:
    first, _, other = await submit(), await submit(), await submit(name="other")
    assert [(await taken(database)).job.id for _ in range(2)] == [first.id, other.id]
    assert await take(database) is None


async def test_the_second_training_of_a_model_waits_whatever_it_is_called(
    submit: Submit, own: Registry, database: Database
) -> None:
    first = await submit()
    assert (await taken(database)).job.id == first.id
    await registry.rename(own, EVE, first.parameters["model"], "renamed")
    await submit(name="renamed")
    another = await submit()  # another model, by the name that is free again
    assert (await taken(database)).job.id == another.id
    assert await take(database) is None


async def test_a_worker_trains_one_at_a_time_and_draws_meanwhile(
    submit: Submit, desk: Desk, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker()):
        first = await submit(steps=LONG)
        await until(database, wake, first.id, "running", step=1)
        second = await submit(name="other")
        drawing = await desk.submit(Order(builders.request(user_id="bo"), "bo"))
        await until(database, wake, drawing.id, "succeeded")
        assert (await look(database, first.id)).status == "running"
        assert (await look(database, second.id)).status == "queued"
        await jobs.cancel(database, first.id)
        wake.wake(BEAT)
        await until(database, wake, first.id, "cancelled")
        await until(database, wake, second.id, "succeeded")
    assert await count(database, ModelVersion) == 1


async def test_a_worker_of_one_place_draws_while_it_trains(
    submit: Submit, desk: Desk, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker(), slots=1):
        training = await submit(steps=LONG)
        await until(database, wake, training.id, "running", step=1)
        drawing = await desk.submit(Order(builders.request(user_id="bo"), "bo"))
        await until(database, wake, drawing.id, "succeeded")
        assert (await look(database, training.id)).status == "running"
        await jobs.cancel(database, training.id)


async def test_beside_a_training_that_killed_its_worker_others_are_drawn(submit: Submit, database: Database) -> None:
    suspect, other = await enqueue(database, "bo", crashes=1), await enqueue(database, "chi")
    training = await submit()
    async with database.transaction() as session:
        (await session.get_one(Request, training.id)).crashes = 1
    claims = await jobs.claim(database, "worker", (), 0, 0, 0)
    assert [claim.job.id for claim in claims] == [training.id]
    claims = await jobs.claim(database, "worker", (), 0, 0, 8, trains=False, alone=False)
    assert [claim.job.id for claim in claims] == [other]
    claims = await jobs.claim(database, "worker", (), 0, 0, 8, trains=False, idle=True)
    assert [claim.job.id for claim in claims] == [suspect]


async def test_a_database_that_is_away_for_a_moment_ends_no_training(
    submit: Submit,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add, tries = trainings._add_version, list[int]()

    async def once_away(*given: Any) -> ModelVersion:
        tries.append(1)
        if len(tries) == 1:
            raise DatabaseUnavailable("it is away")
        return await add(*given)

    monkeypatch.setattr(trainings, "_add_version", once_away)
    async with working(make_worker()):
        await until(database, wake, (await submit()).id, "succeeded", "failed")
    assert len(tries) == 2
    assert await count(database, ModelVersion) == 1


async def test_what_was_revoked_does_not_come_back_with_the_next_consent(
    submit: Submit, own: Registry, desk: Desk, database: Database
) -> None:
    model, version = await add_model(database, own.folder, "eve", "eve")
    lost = own.folder.file_of(version.id, WEIGHTS).parent
    kept = lost.with_name("kept")
    shutil.copytree(lost, kept)
    await registry.revoke(own, EVE, model.id)
    kept.rename(lost)  # as if it could not be removed
    await submit()
    with pytest.raises(NotFound):
        await registry.publish(own, EVE, model.id, 1)
    with pytest.raises(ModelUnavailable):
        await own_models(database, own.folder, "eve", [(version.id, 1.0)])
    assert (await desk.submit(Order(builders.request(user_id="eve"), "eve"))).versions is None
    assert await leftovers.sweep_versions(own.folder, database, seconds=0) == 1


async def test_a_worker_that_stops_puts_it_back_at_once(
    submit: Submit, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    worker = make_worker()
    async with working(worker), asyncio.timeout(PATIENCE):
        job = await submit(steps=LONG)
        await until(database, wake, job.id, "running", step=1)
        await worker.stop(PATIENCE)
    assert (await look(database, job.id)).status == "queued"


@pytest.mark.parametrize("erase", [False, True])
async def test_who_takes_their_consent_back_is_forgotten(
    submit: Submit,
    own: Registry,
    desk: Desk,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
    erase: bool,
) -> None:
    async with working(make_worker()):
        await until(database, wake, (await submit()).id, "succeeded")
        model, version = (await registry.page(own, EVE, "eve"))[0], await version_of(database)
        assert version.id in [getattr(source, "version_id", None) for source in own.models.cache.loaded()]
        again = await submit(steps=LONG)
        await until(database, wake, again.id, "running", step=1)
        waiting = await desk.submit(Order(builders.request(user_id="eve", num_inference_steps=150), "eve"))
        end = registry.erase if erase else registry.revoke
        await end(own, EVE, model.id)
        for job in (again, waiting):
            await until(database, wake, job.id, "cancelled")
    assert version.id not in [getattr(source, "version_id", None) for source in own.models.cache.loaded()]
    await leftovers.sweep_trainings(own.folder, database)
    assert own.folder.versions() == own.folder.trainings() == {}
    assert (await desk.submit(Order(builders.request(user_id="eve"), "eve"))).versions is None
    assert await count(database, ModelVersion) == 0
    assert (await audited(database))[-1] == (
        "eve", "model.erased" if erase else "consent.revoked", f"model:{model.id}",
    )  # fmt: skip


async def test_what_nobody_agrees_to_any_more_is_not_trained(
    submit: Submit, own: Registry, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    job = await submit()
    async with database.transaction() as session:
        (await session.scalars(select(Consent))).one().expires_at = now()
    async with working(make_worker()):
        failed = await until(database, wake, job.id, "failed")
    assert failed.error_code == ConsentMissing.code
    await leftovers.sweep_trainings(own.folder, database)
    assert own.folder.trainings() == {}


async def test_a_version_that_is_found_wanting_waits_for_its_owners_word(
    submit: Submit,
    own: Registry,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.engine.judge.LEAST_VARIETY", 99.0)
    async with working(make_worker()):
        job = await until(database, wake, (await submit()).id, "succeeded")
    assert "look alike" in job.warnings[0]
    (model, *_) = await registry.page(own, EVE, "eve")
    assert (model.status, model.versions) == ("unpublished", 1)
    assert (await registry.publish(own, EVE, model.id, 1)).status == "ready"


async def test_steps_that_go_on_are_no_crash_after_crash(submit: Submit, database: Database) -> None:
    job = await submit()
    for step in (10, 20, 30, 40):  # farther each time
        claim = await taken(database)
        await jobs.beat(database, [(claim, jobs.Progress("training", step, 100))])
        await crashed(database, claim)
        assert (await look(database, job.id)).crashes == 1
    for crashes in (2, 3):
        claim = await taken(database)
        await jobs.beat(database, [(claim, jobs.Progress("training", 40, 100))])
        await crashed(database, claim)
        assert (await look(database, job.id)).crashes == crashes
    assert (await look(database, job.id)).status == "failed"


async def test_a_version_that_was_made_is_not_made_again(
    submit: Submit,
    make_worker: Callable[..., Worker],
    database: Database,
    folder: ModelFolder,
    wake: Wake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish, tries = trainings.publish, list[int]()

    async def once_lost(*given: Any) -> bool:
        tries.append(1)
        if len(tries) == 1:
            await jobs.release(database, given[1])
            return False
        return await publish(*given)

    monkeypatch.setattr(trainings, "publish", once_lost)
    async with working(make_worker()):
        await until(database, wake, (await submit()).id, "succeeded")
    assert len(tries) == 2
    assert await count(database, ModelVersion) == len(folder.versions()) == 1


@pytest.mark.parametrize("published", [False, True])
async def test_a_training_that_is_cancelled_when_all_but_done_leaves_no_version(
    submit: Submit,
    own: Registry,
    make_worker: Callable[..., Worker],
    database: Database,
    wake: Wake,
    monkeypatch: pytest.MonkeyPatch,
    published: bool,
) -> None:
    add = trainings._add_version

    async def then_cancelled(*given: Any) -> ModelVersion:
        version = await add(*given)
        assert await leftovers.sweep_trainings(own.folder, database) == 0, "it goes on, with the version"
        await jobs.cancel(database, version.request_id or "")
        return version

    monkeypatch.setattr(trainings, "_add_version", then_cancelled)
    async with working(make_worker()):
        job = await until(database, wake, (await submit()).id, "succeeded", "cancelled")
    assert job.status == "cancelled"
    if published:  # by somebody who was quick
        await registry.publish(own, EVE, job.parameters["model"], 1)
    await leftovers.sweep_trainings(own.folder, database)
    assert await count(database, ModelVersion) == len(own.folder.versions()) == published


async def test_what_a_consent_that_ended_allowed_is_deleted(
    submit: Submit, own: Registry, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker()):
        job = await until(database, wake, (await submit(keep_pictures=True, consent_days=1)).id, "succeeded")
    version = await version_of(database)
    assert await registry.expire(own) == 0
    async with database.transaction() as session:
        (await session.scalars(select(Consent))).one().expires_at = now()
    assert await registry.expire(own) == 1
    assert own.folder.versions() == own.folder.trainings() == {}
    assert version.id not in [getattr(source, "version_id", None) for source in own.models.cache.loaded()]
    assert (await registry.find(own, EVE, job.parameters["model"])).status == "revoked"
    last = ("sitter:sweep", "consent.expired", f"model:{job.parameters['model']}")
    assert (await audited(database))[-1] == last
    assert await registry.expire(own) == 0


async def test_a_new_consent_keeps_the_model_and_not_what_the_old_one_was_for(
    submit: Submit, own: Registry, make_worker: Callable[..., Worker], database: Database, wake: Wake
) -> None:
    async with working(make_worker()):
        await until(database, wake, (await submit(keep_pictures=True)).id, "succeeded")
        async with database.transaction() as session:
            (await session.scalars(select(Consent))).one().expires_at = now()
        second = await until(database, wake, (await submit(keep_pictures=True)).id, "succeeded")
    assert await registry.expire(own) == 0
    await leftovers.sweep_trainings(own.folder, database)
    assert own.folder.trainings().keys() == {second.id}
    assert len(own.folder.versions()) == 2


async def test_a_loss_that_is_no_number_ends_it(
    submit: Submit, make_worker: Callable[..., Worker], database: Database, wake: Wake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step", lambda trainer: float("nan"))
    async with working(make_worker()):
        job = await until(database, wake, (await submit()).id, "failed")
    assert (job.error_code, await count(database, ModelVersion)) == ("training_failed", 0)
