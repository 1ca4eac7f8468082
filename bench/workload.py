"""Requests of many users as they come in, and how long a way of serving takes over them."""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from api.schemas import GenerateRequest
from bench.arms import Arm, Served

USERS = tuple(f"user{number:03}" for number in range(200))
ZIPF = 1.1
ACTIVE = 8  # users who are there at once
LEAVES = 0.5  # the chance that a user leaves after a picture, and another comes
STEPS = (30, 30, 30, 10, 20, 50)  # most people leave them as they are
GUIDANCE = (7.5, 7.5, 7.5, 5.0, 10.0)  # likewise
SIZE = 512  # pixels: the bundled model draws at no other
ROLES = ("wizard", "firefighter", "pirate", "doctor", "knight", "chef")
PLACES = ("forest", "city", "desert", "library", "harbour", "snowy street")


@dataclass(frozen=True)
class Run:
    """What an arm made of some requests: seconds in all and of every core, and the latency and PNG of each."""

    seconds: float
    cpu_seconds: float
    latencies: list[float]
    pngs: list[bytes]

    @property
    def images_per_second(self) -> float:
        """Returns pictures drawn over the seconds of it all."""
        return len(self.pngs) / self.seconds


def stream(seed: int) -> Iterator[GenerateRequest]:
    """Yields requests without end: ACTIVE users take turns by chance and are followed by others, Zipf over USERS."""
    chance = random.Random(seed)
    weights = [1 / place**ZIPF for place in range(1, len(USERS) + 1)]
    active: list[str] = []
    while True:
        while len(active) < ACTIVE:
            user = chance.choices(USERS, weights)[0]
            if user not in active:
                active.append(user)
        user = chance.choice(active)
        yield GenerateRequest(
            prompt=f"photo of sks person as a {chance.choice(ROLES)} in a {chance.choice(PLACES)}",
            user_id=user,
            num_inference_steps=chance.choice(STEPS),
            guidance_scale=chance.choice(GUIDANCE),
            width=SIZE,
            height=SIZE,
            seed=chance.randrange(2**32),
        )
        if chance.random() < LEAVES:
            active.remove(user)


def alike(requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
    """Returns the requests with the steps and guidance that most have, so that all can share a batch."""
    usual = {"num_inference_steps": STEPS[0], "guidance_scale": GUIDANCE[0]}
    return [request.model_copy(update=usual) for request in requests]


def burst(arm: Arm, requests: Sequence[GenerateRequest]) -> Run:
    """Sends all requests at once."""
    began, cpu_began = time.perf_counter(), arm.cpu_seconds()
    return _finished(arm, began, cpu_began, [began] * len(requests), arm.submit(*requests))


def open_loop(arm: Arm, requests: Sequence[GenerateRequest], rate: float, seed: int) -> Run:
    """Sends `rate` requests a second on average, as a Poisson process; a latency counts from when one was due."""
    chance = random.Random(seed)
    began, cpu_began = time.perf_counter(), arm.cpu_seconds()
    at = began
    due, pictures = list[float](), list["Future[Served]"]()
    for request in requests:
        at += chance.expovariate(rate)
        time.sleep(max(0.0, at - time.perf_counter()))
        due.append(at)
        pictures += arm.submit(request)
    return _finished(arm, began, cpu_began, due, pictures)


def _finished(
    arm: Arm, began: float, cpu_began: float, due: Sequence[float], pictures: "Sequence[Future[Served]]"
) -> Run:
    served = [picture.result() for picture in pictures]
    cpu_seconds = arm.cpu_seconds() - cpu_began
    latencies = [one.at - at for one, at in zip(served, due, strict=True)]
    return Run(max(one.at for one in served) - began, cpu_seconds, latencies, [one.png for one in served])
