"""A check runs in a process with limits: whatever a file holds, the server gets an answer and keeps nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from api.config import ROOT
from api.engine import checkup
from api.engine.checkup import MOST_LETTERS, Checked, check_upload, plain
from api.errors import InvalidRequest, ModelUnavailable
from tests import builders
from tests.builders import LINEAR

DEMO = builders.source("models/demo")
ADA = ROOT / "models/sitters/ada/pytorch_lora_weights.safetensors"


def listing(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def refused(path: Path, **limits: float) -> InvalidRequest:
    before = listing(path.parent)
    with pytest.raises(InvalidRequest) as caught:
        check_upload(path, DEMO, **limits)  # type: ignore[arg-type]
    assert listing(path.parent) == before
    assert str(path.parent) not in caught.value.detail + caught.value.hint
    return caught.value


def test_a_sitters_lora_is_taken() -> None:
    assert check_upload(ADA, DEMO) == Checked("lora", rank=16, layers=67, bytes=ADA.stat().st_size)


def test_a_refusal_says_what_is_wrong_in_one_plain_line(tmp_path: Path) -> None:
    key = "\x1b]0;you are\x07\n\u202eunet." + "x" * 1_000_000
    save_file({key: torch.ones(1)}, tmp_path / "lora.safetensors")
    error = refused(tmp_path / "lora.safetensors")
    assert (error.status, error.hint) == (422, "Is it a LoRA for this base?")
    assert error.detail.startswith("the adapter's key �]0;you are���unet.xxx")
    assert error.detail.endswith("xxx has no counterpart in the base")
    assert len(error.detail) == MOST_LETTERS - 1
    assert error.detail.isprintable()


def test_what_takes_too_much_memory_is_refused(base_folder: Path, tmp_path: Path) -> None:
    rank, width = 20_000_000, 8
    size = rank * width * 4  # 640 MB that are on no disk, and of which looking at them makes a copy
    header = {
        f"unet.{LINEAR}.lora_A.weight": {"dtype": "F32", "shape": [rank, width], "data_offsets": [0, size]},
        f"unet.{LINEAR}.lora_B.weight": {"dtype": "F32", "shape": [width, rank], "data_offsets": [size, 2 * size]},
    }
    content = json.dumps(header).encode()
    file = tmp_path / "lora.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(file, file.stat().st_size + 2 * size)
    with pytest.raises(InvalidRequest, match=r"a check of lora\.safetensors takes more than 0\.6 GB of memory"):
        check_upload(file, builders.source(base_folder), memory_bytes=600_000_000)


def test_a_base_that_is_not_there_is_not_the_files_fault() -> None:
    with pytest.raises(ModelUnavailable, match="models/nobody is not there"):
        check_upload(ADA, builders.source("models/nobody"))


def test_what_takes_too_long_is_refused() -> None:
    error = refused(ADA, seconds=0.01)
    assert error.detail == f"{ADA.name} could not be checked within 0.01 seconds"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The program that is run in place of the check: to be written."""
    monkeypatch.setattr(checkup, "CHILD", "child")
    monkeypatch.setattr(checkup, "ROOT", tmp_path)
    return tmp_path / "child.py"


def test_all_that_a_check_started_is_gone_when_it_is_late(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(
        "import pathlib, subprocess, time\n"
        "sleeper = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path('started').write_text(f'{sleeper.pid}')\n"
        "time.sleep(600)\n"
    )
    refused(ADA, seconds=3.0)
    pid = int((tmp_path / "started").read_text())
    if psutil.pid_exists(pid):  # until whoever adopts it has noticed
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "end", ["raise MemoryError", "os.abort()", "print('{\"checked\":')", "os.kill(os.getpid(), 9)"]
)
def test_a_check_that_breaks_off_refuses(stand_in: Path, end: str) -> None:
    stand_in.write_text(f"import os\n{end}\n")
    assert refused(ADA).detail == f"{ADA.name} could not be checked: its check broke off"


def test_a_check_knows_no_secret_of_the_server(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://sitter:secret@db/sitter")
    monkeypatch.setenv("HF_TOKEN", "secret")
    stand_in.write_text(
        "import json, os\n"
        "print(json.dumps({'error': 'invalid_request', 'detail': ' '.join(os.environ.values()), 'hint': ''}))\n"
    )
    assert "secret" not in refused(ADA).detail


TRY = """
import os, pickle, signal, socket, subprocess, sys
from pathlib import Path
from api.engine.checkup_child import confine

def tried(what):
    try:
        what()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return "done"

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("never",)

hostile = pickle.dumps(Hostile())
confine(Path(sys.argv[1]), 60.0, 1024**3)
print(
    tried(lambda: Path(sys.argv[1], "new").write_bytes(b"x")),
    tried(lambda: pickle.loads(hostile)),
    tried(lambda: socket.create_connection(("127.0.0.1", 9))),
    tried(lambda: subprocess.run(["true"])),
    tried(os.fork),
    tried(lambda: os.system("true")),
    tried(lambda: bytearray(1024**3)),
    tried(lambda: bytearray(1024**2)),
    signal.getitimer(signal.ITIMER_REAL)[0] > 50,
)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not limited")
def test_a_check_gives_up_what_it_does_not_need(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", TRY, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    refusals = ["PermissionError"] * 5
    assert ran.stdout.split() == ["OSError", *refusals, "MemoryError", "done", "True"]


def test_importing_the_check_imports_no_torch() -> None:
    program = "import sys, api.engine.checkup; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout == "False\n"


def test_what_people_read_is_plain() -> None:
    assert plain("the key unet.to_q, “äöü” and 字") == "the key unet.to_q, “äöü” and 字"
    assert plain("a\nb\x00c\x1b[2Jd\u2028e\udcff") == "a�b�c�[2Jd�e�"
    assert plain("a" * MOST_LETTERS) == "a" * MOST_LETTERS
    assert plain("a" * 9_999 + "z") == "a" * 149 + "…" + "a" * 148 + "z"
