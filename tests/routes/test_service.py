import threading

import anyio
import pytest

from api.errors import Busy
from api.routes.service import Waiting


@pytest.mark.anyio
async def test_a_burst_over_the_bound_is_told_busy() -> None:
    waiting, go_on = Waiting(2), threading.Event()
    told: list[object] = []

    async def ask() -> None:
        try:
            told.append(await waiting.run(lambda: go_on.wait(60)))
        except Busy as busy:
            told.append(busy.code)
        if told.count("busy") == 48:
            go_on.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(ask)
    assert sorted(map(str, told)) == ["True"] * 2 + ["busy"] * 48
    assert await waiting.run(lambda: "room again") == "room again"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
