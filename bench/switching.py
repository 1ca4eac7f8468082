"""What it costs the service to go from one user to another, and to hold one more."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from api.schemas import GenerateRequest
from bench.arms import Sitter
from bench.figures import Figure, at_most
from bench.ways import Given

HELD = 20  # users whose bytes are counted, and to whom the service switches


class _Enough(Exception):
    """Ends a drawing after its first step."""


def figures(given: Given) -> Iterator[Figure]:
    """Yields the delay of a first step for a user's LoRA, in host memory and on disk, and the bytes of one more user.

    A delay counts what the LoRA adds to the first step of the base alone, drawn before and after: finding it, reading
    it, applying it, and computing with it.
    """
    first, *others = list(given.loras)[: 1 + HELD]
    arm = Sitter(given)
    try:
        arm.hold([first])
        before = arm.service.cache.used()
        arm.hold(others)
        held = arm.service.cache.used() - before
        stored = sum(given.loras[user].stat().st_size for user in others)
        yield at_most("bytes_per_user_ratio", held / stored, "ratio", 1.1)
        in_memory, on_disk = _switches(arm, others, given)
        yield at_most("switch_host_ms", in_memory * 1000, "ms", 5)
        yield at_most("switch_disk_ms", on_disk * 1000, "ms", 50)
    finally:
        arm.close()


def _switches(arm: Sitter, users: list[str], given: Given) -> tuple[float, float]:
    """Returns the seconds that a first step takes longer than the base's, from memory and from disk.

    Lower quartiles, because whatever else the machine does only ever adds.
    """
    base, from_memory, from_disk = list[float](), list[float](), list[float]()
    for user in users:
        base.append(first_step(arm, "default"))
        from_memory.append(first_step(arm, user))
        arm.service.forget(user)
        _drop_from_page_cache(given.loras[user])
        from_disk.append(first_step(arm, user))
        base.append(first_step(arm, "default"))
    alone, memory, disk = (statistics.quantiles(spent)[0] for spent in (base, from_memory, from_disk))
    return memory - alone, disk - alone


def from_memory(arm: Sitter, users: Sequence[str]) -> float:
    """Returns the seconds that a first step takes longer than the base's, for LoRAs in host memory."""
    spent = [(first_step(arm, "default"), first_step(arm, user)) for user in users]
    alone, switched = ([pair[number] for pair in spent] for number in range(2))
    return statistics.quantiles(switched)[0] - statistics.quantiles(alone)[0]


def first_step(arm: Sitter, user: str) -> float:
    """Returns the seconds from a user's request to the end of its first step."""
    request = GenerateRequest(prompt="photo of sks person as a wizard", user_id=user, num_inference_steps=2, seed=1)
    began, ended = time.perf_counter(), list[float]()

    def stop(_: object) -> None:
        ended.append(time.perf_counter())
        raise _Enough

    try:
        arm.service.generate(request, stop)
    except _Enough:
        return ended[0] - began
    raise AssertionError("the drawing went on after its first step")


def _drop_from_page_cache(file: Path) -> None:
    """Has the next read of `file` come from the disk, where the system knows how (Linux)."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
