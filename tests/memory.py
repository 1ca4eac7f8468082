"""How much memory something takes at most, in a process of its own.

The kernel's own peak, as a process that is forked and executed takes over that of its parent in `ru_maxrss`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from api.config import ROOT

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> int:
    """Makes what is taken now the most that was ever taken, and returns it in bytes."""
    RESET.write_text("5")
    return _kilobytes("VmHWM")


def peak() -> int:
    """Returns the most bytes that were taken since the peak was forgotten."""
    return _kilobytes("VmHWM")


def measured(script: str, *args: object) -> int:
    """Returns the number that a script of Python's prints at its end. Skips the test where no peak is told."""
    if not RESET.exists():
        pytest.skip("only Linux tells how much memory was taken since")
    command = [sys.executable, "-c", script, *map(str, args)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.split()[-1])


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
