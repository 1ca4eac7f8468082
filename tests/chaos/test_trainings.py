"""kill -9 at every step of a training, and in its publishing: it ends once, as if nobody had been killed."""

import asyncio
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from api.config import ModelSource
from api.domain import leftovers, trainings
from api.domain.history import ENDED
from api.domain.photos import choose
from api.domain.trainings import TrainingOrder
from api.engine.dreambooth import SAMPLES, SCENES
from api.store.models import WEIGHTS, ModelFolder, sha256
from api.store.tables import Model, ModelVersion, Request
from api.store.vault import load_vault
from tests.chaos import test_disk_full
from tests.chaos.stage import SCALE, Stage, eventually, staged
from tests.chaos.worker import BALLAST, TRAINING_POINTS
from tests.chaos.zygote import PATIENCE_SECONDS, Zygote
from tests.domain.test_photos import picture, stored

pytestmark = pytest.mark.anyio
small_disk = test_disk_full.small_disk

KILLS = 3 if SCALE == 1 else SCALE
STEPS = 60
# Few samples of few steps, and whatever the tiny base learns is good. Who kills so often shall be begun again.
LITTLE = {"SAMPLE_STEPS": 2, "SCENES": SCENES[:SAMPLES], "LEAST_VARIETY": 0.0, "MAX_CRASHES": 10_000}


@pytest.fixture
def base(quick: Mapping[str, str]) -> ModelSource:
    return ModelSource(base=json.loads(quick["USER_MODELS"])["default"])


def folder_of(stage: Stage) -> ModelFolder:
    return ModelFolder(stage.settings.data_dir)


async def train(stage: Stage, base: ModelSource, name: str, *tags: str, **fields: Any) -> str:
    """Accepts a training that fails where its tags say; returns its id."""
    asked = {"steps": STEPS, "rank": 2, "seed": 5, **fields}
    vault, settings = load_vault(stage.settings), stage.settings.model_copy(update={"auth": "open"})
    with folder_of(stage).collecting() as place:
        chosen = choose(((f"{seed}.png", stored(picture(seed))) for seed in range(3)), place)
        order = TrainingOrder("ada", name, "person", chosen, base, "ada", **asked)
        job = await trainings.submit(settings, stage.database, vault, folder_of(stage), order)
    async with stage.database.transaction() as session:
        (await session.get_one(Request, job.id)).tags = list(tags)
    return job.id


async def train_to_the_end(stage: Stage, env: Mapping[str, str]) -> Counter[int]:
    """Keeps workers at it until every job has ended; returns how each worker did."""

    async def all_have_ended() -> bool:
        return all(job.status in ENDED for job in await stage.jobs())

    def start() -> int:
        return stage.worker(LITTLE, env=env)

    async with asyncio.timeout(PATIENCE_SECONDS + 30 * KILLS):
        return await stage.work_until(all_have_ended, start, at_once=2)


async def versions(stage: Stage) -> dict[str, ModelVersion]:
    """The only version of each model, by the model's name; checks that it draws, and that its files are whole."""
    async with stage.database.reading() as session:
        joined = select(Model, ModelVersion).join(ModelVersion, ModelVersion.model_id == Model.id)
        found = [(model, version) for model, version in await session.execute(joined)]
    for model, version in found:
        assert (version.number, version.refusal, model.published_id) == (1, None, version.id)
        files = {
            path.name: sha256(path.read_bytes()) for path in folder_of(stage).weights_of(version.id).parent.iterdir()
        }
        assert files == version.files
        assert version.sha256 == files[WEIGHTS]
    assert len({model.name for model, _ in found}) == len(found)
    return {model.name: version for model, version in found}


async def check(stage: Stage, ids: list[str], ends: Counter[int]) -> None:
    """Checks that each training has ended well, once, and that nothing is left of it but its version."""
    jobs = await stage.jobs(*ids)
    assert {job.status for job in jobs} == {"succeeded"}, [(job.status, job.error_detail) for job in jobs]
    assert [line.request_id for line in await stage.usage()] == sorted(ids)
    assert ends[-signal.SIGKILL] == stage.failures.total(), stage.log
    assert set(ends) <= {-signal.SIGKILL, 0}, stage.log
    assert "Traceback" not in stage.log, stage.log
    assert "unexpected_error" not in stage.log, stage.log
    folder = folder_of(stage)
    await leftovers.sweep_trainings(folder, stage.database, seconds=-1)
    await leftovers.sweep_versions(folder, stage.database, seconds=-1)
    assert folder.trainings() == {}
    assert folder.versions().keys() == {version.id for version in (await versions(stage)).values()}
    rest = {path.name for room in ("models", "trainings") for path in (stage.settings.data_dir / room).iterdir()}
    assert rest == folder.versions().keys()


async def test_killed_again_and_again_it_ends_as_if_it_had_not_been(
    stage: Stage, base: ModelSource, quick: Mapping[str, str]
) -> None:
    undisturbed = await train(stage, base, "undisturbed")
    ends = await train_to_the_end(stage, quick)
    shutil.rmtree(stage.settings.data_dir / "priors")  # they are drawn again, and again when that is disturbed
    chance = random.Random(KILLS)
    steps = sorted(chance.sample(range(1, STEPS + 1), KILLS - KILLS // 3))
    plan = ["kill-claimed", "kill-phase-caching", "kill-part", *(f"kill-step-{step}" for step in steps)]
    for _ in range(KILLS // 3):  # with half a state, or half a candidate
        plan.insert(chance.randrange(4, len(plan) + 1), "kill-part")
    killed = await train(stage, base, "killed", *plan)
    ends += await train_to_the_end(stage, quick)
    assert stage.failures == Counter(plan)
    made = await versions(stage)
    assert made["killed"].sha256 == made["undisturbed"].sha256
    assert made["killed"].parameters["step"] == made["undisturbed"].parameters["step"]
    await check(stage, [undisturbed, killed], ends)
    [job] = await stage.jobs(killed)
    assert job.attempt == len(plan) + 1
    assert job.training is not None
    learned = [step for step, _ in job.training["losses"]]
    assert learned == sorted(set(learned)), "of steps that were done again the last loss counts"


async def test_killed_in_its_publishing_it_makes_one_version(
    stage: Stage, base: ModelSource, quick: Mapping[str, str]
) -> None:
    plan = [f"kill-{point}" for point in ("phase-validating", *TRAINING_POINTS)]
    plan.insert(plan.index("kill-versioned") + 1, "kill-phase-warming")
    job_id = await train(stage, base, "one", *plan, steps=5)
    ends = await train_to_the_end(stage, quick)
    assert stage.failures == Counter(plan)
    assert len(folder_of(stage).versions()) > 1, "who died with its files left them"
    await check(stage, [job_id], ends)
    [job] = await stage.jobs(job_id)
    assert job.model_id == "ada/one@1"


@pytest.mark.parametrize("point", ["step-2", "phase-publishing"])
async def test_without_room_for_what_it_made_it_waits_and_goes_on(
    zygote: Zygote, database_url: str, small_disk: Path, base: ModelSource, quick: Mapping[str, str], point: str
) -> None:
    async with staged(zygote, database_url, small_disk / "stage") as stage:
        job_id = await train(stage, base, "one", f"fill-{point}", steps=5)
        worker = stage.worker(LITTLE, env=quick)

        async def waits() -> bool:
            job = await stage.job(job_id)
            assert job.status != "failed", job.error_detail
            return job.status == "queued" and job.error_code == "storage_full"

        await eventually(waits, bool, stage)
        assert await versions(stage) == {}
        assert folder_of(stage).versions() == {}
        assert len(folder_of(stage).photos_of(job_id)) == 3
        drawing = await stage.submit(user_id="ada")
        assert (await stage.job(drawing)).versions is None
        (stage.output.parent / BALLAST).unlink()
        job = await stage.until(job_id, "succeeded", "failed")
        assert (job.status, job.attempt, job.crashes, job.error_code) == ("succeeded", 2, 0, None)
        await stage.until(drawing, "succeeded")
        assert await stage.stop(worker) == [0]
        shutil.rmtree(stage.output)
        assert [line.request_id for line in await stage.usage()] == sorted([job_id, drawing])
        assert (await versions(stage)).keys() == {"one"}
        assert len(folder_of(stage).versions()) == 1
