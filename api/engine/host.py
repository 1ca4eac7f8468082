"""The host's memory, as this process may use it; free of torch."""

import math
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int:
    """Returns the bytes that are free for this process now: of the machine, or of the container it runs in."""
    return int(min(psutil.virtual_memory().available, _container_free_bytes()))


def _container_free_bytes() -> float:
    """Returns what the container we run in has left (cgroup v2), or infinity outside of one."""
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if not limit.exists() or (most := limit.read_text().strip()) == "max":
        return math.inf
    return max(0, int(most) - int(used.read_text()))
