"""Checks a model that somebody sent, before anything keeps it: in a process with limits, started here. Free of torch.

What a file may be is in `uploaded`, what the process may do in `checkup_child`.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from api.config import ROOT, ModelSource
from api.errors import InvalidRequest, from_code

log = structlog.get_logger()

CHILD = "api.engine.checkup_child"
MEMORY_BYTES = 2 * 1024**3  # half a gigabyte is enough for Stable Diffusion 1; torch for CUDA is larger itself
MOST_LETTERS = 300  # of what an answer says; a key alone may have two million
TRY_AGAIN = "Export it again as .safetensors, and send it when the server has less to do."
# The libraries find themselves and what was downloaded by these. Nothing else of ours is the child's business: no
# token, no password of a database.
KEPT_VARIABLES = ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "PYTHONPATH")
# One thread each: a check shall not slow the drawing on all cores, nor have memory for threads counted as its own.
OWN_VARIABLES = {
    "PATH": os.defpath,
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Checked:
    """What a good file is.

    Attributes:
        kind: a LoRA over a base, or a whole model.
        rank: the highest of a LoRA's layers, 0 if it changes biases and norms alone; None for a whole model.
        layers: how many it changes; of a whole model all that a LoRA could.
        bytes: of all its files.
    """

    kind: Literal["lora", "full"]
    rank: int | None
    layers: int
    bytes: int


def check_upload(path: Path, source: ModelSource, seconds: float = 60.0, memory_bytes: int = MEMORY_BYTES) -> Checked:
    """Returns what the model at `path` is, if the server could load it; reads it in another process and keeps nothing.

    Blocks for some seconds: call it on a thread.

    Args:
        path: a LoRA or a checkpoint as one .safetensors file, or the folder of a LoRA with its peft settings or of a
            diffusers model. In a folder of its own, as adapter_config.json beside a LoRA is read with it, and under a
            name that nobody can give to something else before it is kept.
        source: the base that a LoRA is for, and of whose architecture a whole model is. It must be on this disk.
        seconds: how long it may take, the start of the process included.
        memory_bytes: how much memory it may take beside the pages of the file itself; held on Linux.

    Raises:
        InvalidRequest: with the first reason to refuse it, or because it takes more time or memory, or ends its check.
        ModelUnavailable: the base cannot be read.
    """
    asked = {
        "path": str(path.absolute()),
        "source": {"base": source.base, "config": source.config},
        "seconds": seconds,
        "memory_bytes": memory_bytes,
    }
    try:
        answer = _ask(json.dumps(asked).encode(), seconds)
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(f"{_name(path)} could not be checked within {seconds:g} seconds", TRY_AGAIN) from error
    if answer is None:
        raise InvalidRequest(f"{_name(path)} could not be checked: its check broke off", TRY_AGAIN)
    if "error" in answer:
        detail = answer["detail"].replace(f"{path.absolute().parent}/", "")
        raise from_code(answer["error"], plain(detail), plain(answer["hint"]))
    return Checked(**answer["checked"])


def plain(text: str) -> str:
    """Returns `text` in one line of MOST_LETTERS or fewer: its middle left out, and a � for what a terminal obeys."""
    if len(text) > MOST_LETTERS:
        half = (MOST_LETTERS - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _name(path: Path) -> str:
    return plain(path.name)


def _ask(question: bytes, seconds: float) -> dict[str, Any] | None:
    """Returns what a child answers, None if it ends without; one that is late is killed with all that it started.

    Raises:
        subprocess.TimeoutExpired: it was.
    """
    variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | OWN_VARIABLES
    with subprocess.Popen(
        [sys.executable, "-m", CHILD],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        try:
            answer, said = child.communicate(question, seconds)
        except BaseException:  # it is late, or this process is asked to stop
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            raise
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:
        # Its last words are of a library or of ours, and may name what is in the file: for the log alone.
        log.warning(
            "checkup_broke_off", code=child.returncode, said=plain(said.decode(errors="replace")[-MOST_LETTERS:])
        )
        return None
    return found
