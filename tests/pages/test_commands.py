"""Commands that a page shows are run as they stand."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli import app
from api.routes.pages.commands import commands
from api.wire.jobs import JobRequest

AWKWARD = '-it\'s "old" $HOME `id` {x} %s \\ \n<b>é 🧑‍🚀</b>'
ORDERS = [
    JobRequest(prompt="photo of sks person", user_id="ada", seed=42),
    JobRequest(prompt=AWKWARD, negative_prompt="-" + AWKWARD, seed=1, scheduler="dpmpp_2m", guidance_scale=5.5),
    JobRequest(prompt="p", preset="fast", num_inference_steps=30, guidance_scale=7.5, seed=3),
    JobRequest(prompt="p", model="eve", model_version=2, width=640, sensitive=True, reproducible=True),
    JobRequest.model_validate({"prompt": "p", "adapters": [{"model": "eve", "weight": 0.5}]}),
]
SHOW = 'curl() { printf "%s\\0" "$@"; }; '
REMEMBER = """
import urllib.request
class Answer:
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def read(self):
        key = request.headers.get("Authorization", "")
        return b"\\0".join([request.full_url.encode(), key.encode(), request.data])
urllib.request.urlopen = lambda request: Answer()
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_key", [False, True])
def test_curl_and_python_ask_for_the_same_picture(order: JobRequest, with_key: bool, tmp_path: Path) -> None:
    found = commands(order, "http://127.0.0.1:8000", with_key)
    environment = {"KEY": "sk_1", "PATH": "/usr/bin:/bin"}
    told = subprocess.run(
        ["/bin/sh", "-c", SHOW + found["curl"]], check=True, capture_output=True, text=True, env=environment
    ).stdout.split("\0")
    assert "http://127.0.0.1:8000/generate/image" in told
    assert ("Authorization: Bearer sk_1" in told) == with_key
    assert JobRequest.model_validate_json(told[told.index("-d") + 1]) == order
    subprocess.run(
        [sys.executable, "-c", REMEMBER + found["Python"]], check=True, env=environment, cwd=tmp_path, timeout=60
    )
    url, key, body = (tmp_path / "picture.png").read_bytes().split(b"\0")
    assert (url.decode(), key.decode()) == ("http://127.0.0.1:8000/generate/image", "Bearer sk_1" if with_key else "")
    assert JobRequest.model_validate(json.loads(body)) == order


@pytest.mark.parametrize("order", ORDERS[:3])
def test_the_command_line_knows_every_option(order: JobRequest) -> None:
    name, *arguments = shlex.split(commands(order, "http://127.0.0.1:8000", with_key=False)["sitter"])
    assert name == "sitter"
    assert arguments[-1] == order.prompt
    # A folder that is not there is told last, once everything else was understood.
    answer = CliRunner().invoke(app, [*arguments[:-3], "/nowhere/there/picture.png", *arguments[-2:]])
    assert "there is no folder" in answer.output, answer.output


def test_what_the_command_line_cannot_draw_is_not_shown_for_it() -> None:
    assert "sitter" not in commands(ORDERS[4], "http://x", with_key=False)
    assert "sitter" not in commands(ORDERS[3], "http://x", with_key=False)
