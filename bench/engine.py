"""Serving many users' LoRAs over one base: the service against what diffusers and peft offer, interleaved in one run.

The arms are in `bench.arms`, each in a process of its own, the requests in `bench.workload`. All have the same
weights, sampler, guidance, precision, threads and bytes for users' models; and every picture of a burst, timed or
not, is compared with arm A's.
"""

import io
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from pathlib import Path

import numpy
from PIL import Image

from api.config import ROOT
from api.engine.threads import in_own_thread
from api.schemas import GenerateRequest
from bench import switching
from bench.apart import Apart
from bench.arms import ARMS, OURS, REFERENCE, RIVALS, Arm
from bench.figures import Figure, at_least, at_most
from bench.loras import write_loras
from bench.ways import Given, bytes_of, load_base
from bench.workload import STEPS, USERS, Run, alike, burst, open_loop, stream

SCALE = 1  # more rounds for steadier figures; 1 takes about a quarter of an hour on two cores
DEMO = ROOT / "models" / "demo"
RATES = (0.6, 0.9)  # of what the fastest arm can do
HISTORY = 5000  # requests that came before, and left their users' models in the cache
TOLERANCE = 0.5  # mean difference of two drawings of one picture, of 255 levels
RANK = 16  # of every LoRA where they are alike
RANKS = (4, 8, 16, 32, 64)
APART = 10  # tolerances that the pictures of two users must differ for the comparison to mean anything
SEED = 22  # few requests, and a fifth of them by users whom arm A has no room for: as in the long run

Requests = Sequence[GenerateRequest]
Arms = Mapping[str, Arm]
Runs = Mapping[str, Sequence[Run]]  # by arm: a run a round


@dataclass(frozen=True)
class Size:
    """How much is measured: rounds, and the requests that a burst and an open loop have in each."""

    rounds: int = 2 * SCALE
    burst: int = 12
    open_loop: int = 12


def figures(size: Size | None = None) -> Iterator[Figure]:
    """Yields images a second and latencies of each arm, what the service gains, and what a switch of users costs.

    Raises:
        AssertionError: an arm draws another picture than A does.
    """
    size = size or Size()
    requests = stream(SEED)
    past = [request.user_id for request in islice(requests, HISTORY)]
    late = list(dict.fromkeys(reversed(past)))[len(USERS) // 4 - 1 :: -1]  # a quarter of all users, the last one last
    bursts = [list(islice(requests, size.burst)) for _ in range(size.rounds)]
    rising = [[list(islice(requests, size.open_loop)) for _ in range(size.rounds)] for _ in RATES]
    soon = _users(bursts)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        # On threads that end: one of this process that stays would slow the service down, see `api/engine/threads.py`.
        unet = in_own_thread(partial(load_base, DEMO)).unet
        loras = in_own_thread(partial(write_loras, Path(folder) / "alike", unet, USERS, (RANK,), SEED))
        mixed = in_own_thread(partial(write_loras, Path(folder) / "mixed", unet, USERS, RANKS, SEED))
        everybody = len(USERS) * bytes_of(unet)  # room for all of arm A's models, by far the largest
        yield from switching.figures(Given(DEMO, loras, everybody, highest_rank=RANK))
        with _arms(Given(DEMO, loras, everybody, highest_rank=RANK), soon) as arms:
            runs = _in_bursts(arms, [alike(requests) for requests in bursts[: (size.rounds + 1) // 2]])
            yield from _speeds(f"every user in cache, requests alike, rank {RANK}", runs)
        with _arms(Given(DEMO, mixed, everybody, highest_rank=max(RANKS)), soon) as arms:
            runs = _in_bursts(arms, bursts)
            yield from _speeds("every user in cache", runs)
            yield at_least("mixed_users_speedup_in_cache", _speedup(runs), "ratio", 1.5)
        room = sum(file.stat().st_size for file in mixed.values()) // 4
        with _arms(Given(DEMO, mixed, room, highest_rank=max(RANKS)), late) as arms:
            runs = _in_bursts(arms, bursts)
            yield from _speeds("room for a quarter of the LoRAs", runs)
            yield at_least("mixed_users_speedup_past_cache", _speedup(runs), "ratio", 2)
            yield from _in_open_loops(arms, max(map(_images_per_second, runs.values())), rising)


def _users(rounds: Sequence[Requests]) -> list[str]:
    return sorted({request.user_id for requests in rounds for request in requests})


@contextmanager
def _arms(given: Given, held: Sequence[str]) -> Iterator[Arms]:
    """Every arm, with the models of users `held` in its cache, the last one last, once each draws the right pictures.

    An arm whose budget has no room for all of them has the last ones.
    """
    with ExitStack() as closing:
        arms: dict[str, Arm] = {name: Apart(name, given) for name in ARMS}
        for arm in arms.values():
            closing.callback(arm.close)
            arm.hold(held)
        _check_users_apart(arms, held[-3:])
        yield arms


def _check_users_apart(arms: Arms, users: Sequence[str]) -> None:
    """Raises AssertionError unless every arm draws one prompt and seed as A does for each user, and A not alike."""
    prompt, steps = "photo of sks person as a wizard in a forest", STEPS[0]
    requests = [GenerateRequest(prompt=prompt, user_id=user, num_inference_steps=steps, seed=SEED) for user in users]
    runs = {name: burst(arm, requests) for name, arm in arms.items()}
    _check_pictures(runs)
    for one, other in combinations(runs[REFERENCE].pngs, 2):
        assert _difference(one, other) > APART * TOLERANCE, "the LoRAs are too weak to tell users apart"


def _check_pictures(runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        for number, (expected, drawn) in enumerate(zip(runs[REFERENCE].pngs, run.pngs, strict=True)):
            off = _difference(expected, drawn)
            assert off <= TOLERANCE, f"{name}: picture {number} is {off:.2f} levels off that of {REFERENCE}"


def _difference(one: bytes, other: bytes) -> float:
    """Returns the mean difference of two PNGs in levels of 255."""
    first, second = (numpy.asarray(Image.open(io.BytesIO(png)), numpy.float32) for png in (one, other))
    return float(numpy.abs(first - second).mean())


def _in_bursts(arms: Arms, bursts: Sequence[Requests]) -> Runs:
    """Runs each burst through every arm, every second one through the last arm first."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for number, requests in enumerate(bursts):
        for name in _order(arms, number):
            runs[name].append(burst(arms[name], requests))
        _check_pictures({name: runs[name][-1] for name in arms})
    return runs


def _in_open_loops(arms: Arms, capacity: float, rising: Sequence[Sequence[Requests]]) -> Iterator[Figure]:
    ratios = []
    for share, rounds in zip(RATES, rising, strict=True):
        latencies: dict[str, list[float]] = {name: [] for name in arms}
        for number, requests in enumerate(rounds):
            for name in _order(arms, number):
                latencies[name] += open_loop(arms[name], requests, share * capacity, SEED + number).latencies
        late = {name: statistics.quantiles(all_, n=20, method="inclusive")[18] for name, all_ in latencies.items()}
        for name, all_ in latencies.items():
            rate = f"{share * capacity:.2g} requests a second"
            yield Figure(f"{name}: p50 at {rate} ({share:g} of the fastest arm's most)", statistics.median(all_), "s")
            yield Figure(f"{name}: p95 at {rate} ({share:g} of the fastest arm's most)", late[name], "s")
        ratios.append(late[OURS] / min(late[name] for name in RIVALS))
    yield at_most("mixed_users_p95_ratio", max(ratios), "ratio", 0.5)


def _order(arms: Arms, number: int) -> list[str]:
    return list(arms)[:: -1 if number % 2 else 1]


def _speeds(condition: str, runs: Runs) -> Iterator[Figure]:
    for name, rounds in runs.items():
        yield Figure(f"{name}: images a second, {condition}", _images_per_second(rounds), "1/s")
    for name, rounds in runs.items():  # steadier than the clock where others use the machine
        spent = sum(run.cpu_seconds for run in rounds) / sum(len(run.pngs) for run in rounds)
        yield Figure(f"{name}: CPU seconds an image, {condition}", spent, "s")


def _speedup(runs: Runs) -> float:
    """Returns the median over rounds of the service's images a second over those of the best rival."""
    best = max(RIVALS, key=lambda name: _images_per_second(runs[name]))
    rounds = zip(runs[OURS], runs[best], strict=True)
    return statistics.median(ours.images_per_second / theirs.images_per_second for ours, theirs in rounds)


def _images_per_second(rounds: Sequence[Run]) -> float:
    return sum(len(run.pngs) for run in rounds) / sum(run.seconds for run in rounds)
