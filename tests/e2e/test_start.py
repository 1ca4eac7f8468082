"""Every way to start it, every way to end it, and the commands beside it."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from api.wiring import GRACEFUL_SECONDS
from tests.e2e.pictures import open_png
from tests.e2e.server import API, ONE_STEP, PATIENCE_SECONDS, ROOT, SITTER, SMALL, Server, environment

MAIN = (sys.executable, "main.py")
UVICORN = (sys.executable, "-m", "uvicorn", "main:app", "--port", "{port}")


def run(*command: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(COLUMNS="200", **settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def long_drawing(pool: ThreadPoolExecutor, server: Server) -> "Future[httpx2.Response]":
    """A drawing of many minutes, under way: this model draws 512 × 2048 for it."""
    server.drawn(user_id="bo")
    endless = {**SMALL, "user_id": "bo", "width": 256, "height": 1024, "num_inference_steps": 150, "num_images": 4}
    drawing = pool.submit(server.client.post, "/generate", json=endless)
    while not any(model["in_use"] for model in server.get("/cache")["models"]):
        assert not drawing.done()
    return drawing


def assert_given_up(drawing: "Future[httpx2.Response]") -> None:
    """The one who waited got an answer, or the end of the connection."""
    error = drawing.exception(PATIENCE_SECONDS)
    if error is None:
        assert drawing.result().json()["error"] == "shutting_down"
    else:
        assert isinstance(error, httpx2.TransportError)


def test_python_main_py(models: Path, tmp_path: Path) -> None:
    """Its curl line makes a picture; a full queue says so; SIGTERM ends it in the middle of a drawing."""
    users = {"ada": str(models / "one")}  # fast: the line asks for the defaults
    with Server(tmp_path, users, command=MAIN, cwd=API, WORKERS="1", LIMIT_QUEUED="1") as server:
        assert f"http://127.0.0.1:{server.port}" in server.log
        [line] = re.findall(r"curl .*\\\n.*", server.log)
        if shutil.which("curl"):
            subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=PATIENCE_SECONDS)
            assert open_png((tmp_path / "ada.png").read_bytes()).size == (512, 512)
        with ThreadPoolExecutor(1) as pool:
            drawing = long_drawing(pool, server)
            assert server.client.post("/jobs", json=ONE_STEP).status_code == 202
            refused = server.draw()
            assert (refused.status_code, refused.json()["error"]) == (429, "limit_reached")
            assert int(refused.headers["Retry-After"]) > 0
            assert server.stop(signal.SIGTERM) == 0
            assert_given_up(drawing)


def test_uvicorn_main_app(tmp_path: Path) -> None:
    """SIGINT ends it in the middle of a drawing, once the time that uvicorn gives it is over."""
    command = (*UVICORN, "--timeout-graceful-shutdown", "1")
    with Server(tmp_path, command=command, cwd=API) as server, ThreadPoolExecutor(1) as pool:
        drawing = long_drawing(pool, server)
        server.stop(signal.SIGINT)
        assert_given_up(drawing)


def test_ctrl_c_ends_sitter_serve(tmp_path: Path) -> None:
    with Server(tmp_path) as serving:
        assert serving.stop(signal.SIGINT) == 0
        assert serving.log.rstrip().endswith("Stopped.")


def test_a_second_ctrl_c_ends_it_in_the_middle_of_a_drawing(tmp_path: Path) -> None:
    with Server(tmp_path) as serving, ThreadPoolExecutor(1) as pool:
        drawing = long_drawing(pool, serving)
        serving.signal(signal.SIGINT)
        while "Ctrl-C again stops now" not in serving.log:
            assert not drawing.done()
        assert "Stopped." not in serving.log
        began = time.monotonic()
        assert serving.stop(signal.SIGINT) == 128 + signal.SIGINT
        assert time.monotonic() - began < GRACEFUL_SECONDS
        assert isinstance(drawing.exception(PATIENCE_SECONDS), httpx2.TransportError)


def test_it_listens_on_all_addresses(models: Path, tmp_path: Path) -> None:
    with Server(tmp_path, {"default": str(models / "one")}, HOST="0.0.0.0", AUTH="required") as server:
        assert f"Sitter is at http://127.0.0.1:{server.port} " in server.log
        assert "listens on all addresses" in server.log
        assert "http://0.0.0.0" not in server.log
        shown = run(*SITTER, "cache", HOST="0.0.0.0", PORT=str(server.port))
        assert shown.returncode == 1
        assert "--key" in shown.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "-", "ä..b"])
def test_an_address_of_another_machine(host: str) -> None:
    ended = run(*SITTER, "serve", HOST=host, PORT="0", AUTH="required")
    assert ended.returncode == 2
    assert f"{host} is not an address of this machine" in ended.stderr
    assert "HOST=127.0.0.1" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "not free" not in ended.stderr


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run(*SITTER, "serve", "--port", port)
    assert ended.returncode == 2
    assert port in ended.stderr
    assert "choose another address with HOST or PORT" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Sitter is at" not in ended.stdout


@pytest.mark.parametrize("command", [(*SITTER, "serve"), MAIN, (*UVICORN[:-1], "0")])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "eighty", "PORT"),
        ("HOST_CACHE_GB", "-1", "HOST_CACHE_GB"),
        ("DTYPE", "int8", "DTYPE"),
        ("USER_MODELS", '{"../x": "models/demo"}', "USER_MODELS"),
        ("USER_MODELS", "{broken", "USER_MODELS"),
        ("SITTER_PORT", "8000", "SITTER_PORT"),
        ("SITTER_CONFIG", "nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_setting_that_does_not_fit_stops_the_start(command: Sequence[str], name: str, value: str, says: str) -> None:
    ended = run(*command, cwd=API if "main" in str(command) else ROOT, **{"PORT": "0", name: value})
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 4


@pytest.mark.parametrize("command", [(*SITTER, "serve"), MAIN, (*UVICORN[:-1], "0")])
def test_an_output_folder_that_cannot_be_written_stops_the_start(command: Sequence[str], tmp_path: Path) -> None:
    (tmp_path / "output").touch()
    ended = run(*command, cwd=API if "main" in str(command) else ROOT, PORT="0", OUTPUT_DIR=str(tmp_path / "output"))
    assert ended.returncode == 1
    said = ended.stderr.splitlines()
    assert said[0].startswith(f"pictures cannot be kept in {tmp_path / 'output'}: ")
    assert said[1:] == ["Set OUTPUT_DIR to a folder that the server may write to."]
    assert "Sitter is at" not in ended.stdout


@pytest.mark.parametrize("command", [(*SITTER, "serve"), (*UVICORN[:-1], "0")])
def test_a_database_that_is_away_stops_the_start(command: Sequence[str], tmp_path: Path) -> None:
    away = {"DATABASE_URL": "postgresql://127.0.0.1:1/sitter", "OUTPUT_DIR": str(tmp_path / "output")}
    ended = run(*command, cwd=API if "main" in str(command) else ROOT, PORT="0", **away)
    assert ended.returncode == 1
    reason, hint = ended.stderr.splitlines()
    assert reason.startswith("the database does not answer: ")
    assert "DATABASE_URL" in hint
    assert "Sitter is at" not in ended.stdout


def test_an_unknown_setting_in_a_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "sitter.yaml").write_text("prot: 8000\n")
    ended = run(*SITTER, "serve", SITTER_CONFIG=str(tmp_path / "sitter.yaml"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("unknown setting prot in sitter.yaml; did you mean PORT?\n")


@pytest.mark.parametrize("module", ["api.main", "api.cli"])
def test_it_is_imported_without_torch(module: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'safetensors', 'numpy'}"
    ended = run(sys.executable, "-c", f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))")
    assert ended.stdout.strip() == "[]"


def test_sitter_models(server: Server, models: Path) -> None:
    server.drawn()
    ended = run(*SITTER, "cache", "--address", f"http://127.0.0.1:{server.port}")
    assert ended.returncode == 0, ended.stderr
    assert str(models / "one") in ended.stdout
    assert "bytes" in ended.stdout
    nobody = run(*SITTER, "cache", "--address", "http://127.0.0.1:9")
    assert nobody.returncode == 1
    assert "sitter serve" in nobody.stderr


def test_sitter_doctor(models: Path) -> None:
    users = {"truncated": str(models / "truncated"), "hub": "nobody/there-is-no-such-model"}
    ended = run(*SITTER, "doctor", USER_MODELS=json.dumps(users))
    assert ended.returncode == 1
    said = dict(re.findall(r"^ +\S+ +(\w+): (.*)$", ended.stdout, re.MULTILINE))
    assert said.keys() == {"default", "ada", "bo", "chi", "truncated", "hub"}
    assert "cut short" in said["truncated"]
    assert "downloaded" in said["hub"]
    for user in ("default", "ada", "bo", "chi"):
        assert re.search(rf"loads +{user}:", ended.stdout)


def test_sitter_doctor_tries_the_output_folder(models: Path, tmp_path: Path) -> None:
    users = json.dumps(dict.fromkeys(("default", "ada", "bo", "chi"), str(models / "one")))
    well, ill = (
        run(*SITTER, "doctor", USER_MODELS=users, OUTPUT_DIR=str(folder))
        for folder in (tmp_path / "output", models / "one" / "model_index.json")
    )
    assert well.returncode == 0, well.stdout
    assert f"pictures are kept in {tmp_path / 'output'}\n" in well.stdout
    assert ill.returncode == 1
    assert "pictures cannot be kept in" in ill.stdout
    assert "Set OUTPUT_DIR" in ill.stdout


def test_sitter_generate(tmp_path: Path) -> None:
    fields = {"--steps": "1", "--width": "320", "--height": "256", "--seed": "3", "--user": "ada"}
    options = [part for option in fields.items() for part in option]
    prompt = "sks person " * 60 + "as a knight"
    ended = run(*SITTER, "generate", prompt, *options, "-o", str(tmp_path / "x.png"), DATA_DIR=str(tmp_path / "data"))
    assert ended.returncode == 0, ended.stderr
    assert re.search(r'The prompt is too long .* did not read "….* as a knight"', ended.stderr.replace("\n", " "))
    assert open_png((tmp_path / "x.png").read_bytes()).size == (320, 256)
    assert "models/sitters/ada, seed 3" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["", "--steps", "1"], "prompt"),
        (["x", "--steps", "0"], "num_inference_steps"),
        (["x", "--user", "../x"], "user"),
    ],
)
def test_sitter_generate_says_what_does_not_fit(arguments: list[str], says: str, tmp_path: Path) -> None:
    ended = run(*SITTER, "generate", *arguments, "-o", str(tmp_path / "x.png"))
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
