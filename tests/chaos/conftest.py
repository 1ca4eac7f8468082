"""A stage for each test here, and every test marked `slow`."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.chaos.stage import Stage, staged
from tests.chaos.zygote import Zygote
from tests.e2e import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The setting of small models that draw noise, fast: `ada`, `bo` and `chi` have one each."""
    folder = tmp_path_factory.mktemp("quick")
    models = {user: str(tiny.build(folder / user, seed)) for seed, user in enumerate(("ada", "bo", "chi"))}
    return {"USER_MODELS": json.dumps({"default": models["ada"], **models})}


@pytest.fixture
async def stage(zygote: Zygote, database_url: str, tmp_path: Path, anyio_backend: str) -> AsyncIterator[Stage]:
    """A fresh database on each kind in turn, and processes over it."""
    async with staged(zygote, database_url, tmp_path / "stage") as stage:
        yield stage
