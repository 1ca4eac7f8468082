"""The script of api/test_api.py against a running server."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pictures import open_png
from tests.e2e.server import API, Server

PICTURES = API / "test_output"


@pytest.fixture
def _pictures_kept() -> Iterator[None]:
    before = {file: file.read_bytes() for file in PICTURES.glob("*.png")}
    yield
    for file in PICTURES.glob("*.png"):
        if file not in before:
            file.unlink()
    for file, content in before.items():
        file.write_bytes(content)


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "test_api.py", *options]
    return subprocess.run(command, cwd=API, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("_pictures_kept")
def test_the_script_runs_every_endpoint(server: Server) -> None:
    ended = run_script("--url", f"http://127.0.0.1:{server.port}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * (len(lines) - 1)
    for endpoint in ("GET /health", "POST /generate", "POST /generate/image", "DELETE /cache", "GET /docs"):
        assert endpoint in ended.stdout
    for name in ("default", "ada", "bo", "chi", "image"):
        assert open_png((PICTURES / f"{name}.png").read_bytes()).size == (512, 512)


def test_the_script_says_when_no_server_is_up() -> None:
    ended = run_script("--url", "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert "No server answers at http://127.0.0.1:9" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_pytest_leaves_the_script_alone() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(API / "test_api.py")]
    ended = subprocess.run(command, cwd=Path(API).parent, capture_output=True, text=True, check=False)
    assert "no tests collected" in ended.stdout
