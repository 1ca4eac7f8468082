"""One team of OpenMP threads at a time lives on: with two, each step of the loop takes twice as long on two cores."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from api.engine.threads import in_own_thread

DRAW = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from api.model_service import ModelService
from tests import builders
from tests.engine.test_threads import THREADS, teams

users = {"default": builders.source(sys.argv[1]), "chi": builders.source(sys.argv[2])}
service = ModelService(builders.settings(users))
together = threading.Barrier(THREADS)

def draw(number):
    together.wait()
    service.generate(builders.request(user_id=("default", "chi")[number % 2], prompt=f"picture {number}"))
    together.wait()

with ThreadPoolExecutor(THREADS) as pool:
    list(pool.map(draw, range(THREADS)))
    print(teams())
service.close()
"""
THREADS = 6


def teams() -> int:
    """How many threads of this process are not Python's."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_requests_leave_no_teams_behind(base_folder: Path, tmp_path: Path) -> None:
    other = str(base_folder)
    few, many = (_teams_after(base_folder, other, threads) for threads in ("1", "2"))
    assert many - few <= 1  # the step loop's


def _teams_after(base: Path, other: str, threads: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(base), other], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def test_what_a_thread_raises_is_raised_here() -> None:
    def fail() -> None:
        raise ValueError("it does not work")

    with pytest.raises(ValueError, match="does not work"):
        in_own_thread(fail)
    assert in_own_thread(threading.current_thread) is not threading.current_thread()
    assert not in_own_thread(threading.current_thread).is_alive()
