import re
from typing import Any

import pytest
from sqlalchemy import event

from api.domain import history, jobs
from api.errors import BadPicture
from api.store.database import Database
from tests.gallery import caller
from tests.jobs import enqueue, finished, taken

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("status", "tables"),
    [
        ("queued", {"requests", "usage"}),
        ("running", {"requests", "usage"}),
        ("succeeded", {"requests", "images"}),
        ("failed", {"requests"}),
    ],
)
async def test_a_look_reads_no_more_than_it_shows(database: Database, status: str, tables: set[str]) -> None:
    """Whoever follows a job looks at it each second."""
    job_id = await enqueue(database, "ada")
    if status != "queued":
        claim = await taken(database)
        if status == "succeeded":
            await jobs.publish(database, claim, finished(claim, pictures=2))
        elif status == "failed":
            await jobs.fail(database, claim, BadPicture("black"))
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(database._engine.sync_engine, "before_cursor_execute", note)
    seen = await history.find(database, caller("ada"), job_id)
    assert set(re.findall(r"FROM (\w+)", " ".join(statements))) == tables
    assert (seen.job.status, len(seen.images)) == (status, 2 if status == "succeeded" else 0)
    assert seen.position == (1 if status == "queued" else None)


async def test_drawings_and_trainings_have_places_of_their_own(database: Database) -> None:
    """Trainings that wait hold no drawing up: a share of the device is theirs."""
    for _ in range(3):
        await enqueue(database, "eve", kind="train", work=0)
    drawings = [await enqueue(database, "ada", start_tag=tag) for tag in (1, 2)]
    training = await enqueue(database, "ada", kind="train", work=0, start_tag=3)
    places = [(await history.find(database, caller("ada"), job_id)).position for job_id in (*drawings, training)]
    assert places == [1, 2, 4]
