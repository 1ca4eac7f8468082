"""A stage for each test here, and every test marked `slow`."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.chaos.stage import Stage, Zygote, staged


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture
async def stage(zygote: Zygote, database_url: str, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Stage]:
    """A fresh database on each kind in turn, and processes over it."""
    async with staged(zygote, database_url, tmp_path / "stage") as stage:
        yield stage
