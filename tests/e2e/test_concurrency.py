"""Many requests at once: nothing mixes, nothing is loaded twice, nobody waits for another's mistake."""

import socket
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations, cycle, islice
from typing import Any

import httpx2
import pytest

from tests.e2e.pictures import ROUNDING, difference, open_png, png_of
from tests.e2e.server import SMALL, Server

Fields = dict[str, Any]

MIXED = [
    {"user_id": user, "width": width, "height": height, "num_inference_steps": steps, "seed": index}
    for index, (user, (width, height), steps) in enumerate(
        zip(
            cycle(["ada", "bo", "chi", "default"]),
            [(256, 256)] * 4 + [(320, 256)] * 2 + [(256, 384)] * 2 + [(256, 256)] * 4,
            [1, 2, 3, 4] * 3,
            strict=False,
        )
    )
]


def is_as_large(one: bytes, other: bytes) -> bool:
    return open_png(one).size == open_png(other).size


def draw_at_once(server: Server, requests: Iterable[Fields]) -> list[Fields]:
    wanted = list(requests)
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(lambda fields: server.drawn(**fields), wanted))


def in_background(pool: ThreadPoolExecutor, server: Server, **fields: Any) -> "Future[Fields]":
    return pool.submit(lambda: server.drawn(**fields))


@pytest.mark.parametrize(("number", "reproducible", "rounding"), [(64, False, ROUNDING), (24, True, 0)])
def test_many_at_once_draw_what_each_draws_alone(
    sitters: Server, capsys: pytest.CaptureFixture[str], number: int, reproducible: bool, rounding: int
) -> None:
    how = {"reproducible": reproducible}
    wanted = [{**fields, **how} for fields in islice(cycle(MIXED), number)]
    together = draw_at_once(sitters, wanted)
    alone = [png_of(sitters.drawn(**fields, **how)) for fields in MIXED]
    worst = max(difference(png_of(drawn), twin) for drawn, twin in zip(together, cycle(alone), strict=False))
    with capsys.disabled():
        print(f"\n{number} pictures at once, {how}: max pixel difference to their solo twins {worst}")
    assert worst <= rounding
    assert all(difference(one, other) > ROUNDING for one, other in combinations(alone, 2) if is_as_large(one, other))
    assert len({drawn["image_path"] for drawn in together}) == number
    assert [drawn["model_id"].rpartition("/")[2] for drawn in together[:4]] == ["ada", "bo", "chi", "demo"]
    lora = "exact" if reproducible else "batch"
    assert [drawn["lane"] for drawn in together[:4]] == [lora, lora, "exact", "exact"]


@pytest.mark.parametrize("user", ["ada", "chi"])
def test_32_first_requests_load_a_model_once(sitters: Server, user: str) -> None:
    sitters.clear_cache()
    # A size that no model draws is refused after the model was loaded, so nothing is drawn here.
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: sitters.draw(user_id=user, width=257), range(32)))
    assert {answer.status_code for answer in answers} == {422}
    for model in sitters.get("/cache")["models"]:
        assert model["hits"] == 31, "each but the first found it"


def test_the_cache_is_emptied_while_models_draw(server: Server) -> None:
    wanted = [
        {"user_id": user, "seed": seed, "num_inference_steps": 4} for seed in range(3) for user in ("a", "second")
    ]
    alone = [png_of(server.drawn(**fields)) for fields in wanted]
    emptied = 0
    with ThreadPoolExecutor(len(wanted)) as pool:
        drawings = [in_background(pool, server, **fields) for fields in wanted]
        while not all(drawing.done() for drawing in drawings):
            server.clear_cache()
            emptied += 1
            time.sleep(0.02)
    for drawing, twin in zip(drawings, alone, strict=True):
        assert difference(png_of(drawing.result()), twin) <= ROUNDING
    assert emptied > 1
    server.clear_cache()
    assert server.get("/cache")["used_bytes"] == {"cpu": 0}


def test_clients_that_leave_disturb_nobody(server: Server) -> None:
    alone = png_of(server.drawn(seed=7))
    with ThreadPoolExecutor(16) as pool:
        leaving = [
            pool.submit(server.client.post, "/generate", json={**SMALL, "seed": 8}, timeout=0.05) for _ in range(8)
        ]
        staying = [in_background(pool, server, seed=7) for _ in range(8)]
        assert max(difference(png_of(drawing.result()), alone) for drawing in staying) <= ROUNDING
        for request in leaving:
            with pytest.raises(httpx2.TimeoutException):
                request.result()
    for _ in range(20):
        socket.create_connection(("127.0.0.1", server.port)).close()
    assert difference(png_of(server.drawn(seed=7)), alone) <= ROUNDING


def test_health_and_cache_answer_while_it_draws(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        drawing = in_background(pool, server, num_inference_steps=150)
        answered = in_use = 0
        while not drawing.done():
            server.get("/health")
            in_use += any(model["in_use"] for model in server.get("/cache")["models"])
            answered += not drawing.done()
        drawing.result()
    assert answered > 1
    assert in_use > 1


def test_a_broken_model_does_not_stop_the_others(server: Server) -> None:
    server.clear_cache()
    users = ["missing", "default", "truncated", "second", "pickled", "hub", "default", "second"] * 2
    with ThreadPoolExecutor(len(users)) as pool:
        answers = list(pool.map(lambda user: server.draw(user_id=user), users))
    whole = {"default", "second"}
    assert [answer.status_code for answer in answers] == [200 if user in whole else 503 for user in users]
