import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.config import Settings
from tests import builders
from tests.hub import Hub, running


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*Settings.model_fields, "sitter_config"} & {name.lower() for name in os.environ}:
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base in a diffusers folder; not to be changed."""
    return builders.save_pipeline(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def stocked(hub: Hub, base_folder: Path) -> Hub:
    """A hub with the tiny base, and beside it what nobody needs."""
    files = [file for file in base_folder.rglob("*") if file.is_file()]
    hub.files = {str(file.relative_to(base_folder)): file.read_bytes() for file in files}
    hub.files |= dict.fromkeys(("README.md", "unet/model.bin", "unet/model.fp16.safetensors", "a.ckpt"), b"not wanted")
    return hub
