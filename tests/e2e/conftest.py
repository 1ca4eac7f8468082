"""Servers that tests share, and every test here marked `e2e`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import broken, tiny
from tests.e2e.server import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models `one` and `two`, and the broken ones."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny.build(folder / name, seed)
    broken.build(folder)
    return folder


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models draw noise, fast: for `second` the model `two`, else `one`; many more are broken."""
    one, two = str(models / "one"), str(models / "two")
    sitters = dict.fromkeys(("ada", "bo", "chi"), one)
    users = {"default": one, "second": two, **sitters, **broken.users(models)}
    with Server(tmp_path_factory.mktemp("server"), users, HUB_TIMEOUT_SECONDS="2") as running:
        yield running


@pytest.fixture(scope="session")
def sitters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the bundled models and the settings as they come."""
    with Server(tmp_path_factory.mktemp("sitters")) as running:
        yield running


@pytest.fixture
def output(server: Server) -> Path:
    """The folder of the server's pictures, empty."""
    for file in server.output.glob("*"):
        file.unlink()
    return server.output
