"""The process that `checkup` starts: takes one question from stdin, gives up what it may not do, answers, and ends."""

import json
import math
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from api.config import ModelSource, Settings
from api.engine.skeleton import Skeleton
from api.engine.sources import find_base
from api.engine.uploaded import examine
from api.engine.weights import is_out_of_memory
from api.errors import InvalidRequest, ModelUnavailable, SitterError

HINT = "Export it again as .safetensors, for this base."
# By the names that Python's own audit gives them: https://docs.python.org/3/library/audit_events.html
REFUSED = frozenset(
    {
        "pickle.find_class",
        "socket.connect",
        "socket.sendto",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
    }
)


def main() -> None:
    """Answers with one line of JSON on stdout: what the model is, or the error to raise."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    asked = json.load(sys.stdin)
    path = Path(asked["path"])
    confine(path, asked["seconds"], asked["memory_bytes"])
    answer = judge(path, ModelSource(**asked["source"]), asked["memory_bytes"])
    with os.fdopen(answers, "w") as out:
        out.write(json.dumps(answer))


def confine(path: Path, seconds: float, memory_bytes: int) -> None:
    """Gives up this process's right to more time and memory, to write, to start anything and to reach anybody.

    The parent kills what is late; these limits also hold when it is not there any more.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    # Of data and not of addresses: torch reserves many gigabytes of addresses that it never fills, with CUDA far more
    # than without. Torch maps a weight file privately, which counts as data and is none: nothing writes to it.
    mapped = max(file.lstat().st_size for file in (path, *path.rglob("*.safetensors"))) if os.path.lexists(path) else 0
    _limit(resource.RLIMIT_DATA, memory_bytes + mapped)
    sys.addaudithook(_refuse)


def judge(path: Path, source: ModelSource, memory_bytes: int) -> dict[str, Any]:
    """Returns what the model at `path` is, or the error to raise, as `main` writes it."""
    # Asks for no settings: the base is on this disk, and there is no hub to be asked.
    settings = Settings.model_construct(hf_token=None, hub_timeout_seconds=1.0)
    try:
        try:
            base = Skeleton.of(find_base(source, settings))
        except SitterError as error:
            return _told(error.code, error.detail, error.hint)
        try:
            return {"checked": asdict(examine(path, base))}
        except SitterError as error:
            # The hint of the class is for who runs the server.
            return _told(InvalidRequest.code, error.detail, HINT if error.hint == ModelUnavailable.hint else error.hint)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        detail = f"a check of {path.name} takes more than {memory_bytes / 1e9:.1f} GB of memory"
        return _told(InvalidRequest.code, detail, HINT)


def _told(code: str, detail: str, hint: str) -> dict[str, Any]:
    return {"error": code, "detail": detail, "hint": hint}


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (least, least))


def _refuse(event: str, _: tuple[Any, ...]) -> None:
    if event in REFUSED:
        raise PermissionError(f"{event} has no place in a check")


if __name__ == "__main__":
    main()
