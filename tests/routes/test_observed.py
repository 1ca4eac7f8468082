"""Request ids, counters and logs, through the whole application."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient

from api.main import create_app
from api.wiring import configure_logging
from tests import builders
from tests.e2e.server import CANARY, ONE_STEP

SOME_KEY = "sk_" + "hushhush" * 5
NEW_ID = re.compile("[0-9a-f]{16}")


@pytest.fixture(scope="module")
def client(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("service")
    default = {"default": builders.source(base_folder), "eve": builders.source("/nowhere")}
    settings = builders.settings(default, output_dir=folder / "out", data_dir=folder / "data")
    app = create_app(settings)

    @app.get("/broken/{what}")
    def break_down(what: str) -> None:
        raise RuntimeError("broken")

    here: dict[str, Any] = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 40_000)}
    with TestClient(app, raise_server_exceptions=False, **here) as client:
        yield client
    structlog.reset_defaults()


@pytest.fixture
def log(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> "Log":
    """Everything that the application says from now on."""
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        configure_logging("debug")
    return Log(stream)


class Log:
    """What was logged since the test began."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def __str__(self) -> str:
        return self._stream.getvalue()

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, str(self).splitlines()) if line["event"] == event]


def test_every_answer_tells_its_id(client: TestClient) -> None:
    ids = set()
    for method, path, status in (
        ("GET", "/health/live", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/generate", 405),
        ("POST", "/generate", 422),
        ("GET", "/broken/thing", 500),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert NEW_ID.fullmatch(answer.headers["X-Request-ID"])
        ids.add(answer.headers["X-Request-ID"])
    too_large = client.post("/generate", content=b" " * 1_000_001)
    stranger = client.get("/health", headers={"Host": "elsewhere"})
    assert (too_large.status_code, stranger.status_code) == (413, 403)
    ids |= {too_large.headers["X-Request-ID"], stranger.headers["X-Request-ID"]}
    assert len(ids) == 7


@pytest.mark.parametrize("given", ["abc-123_x.y", "A" * 64])
def test_a_sane_id_is_kept(client: TestClient, given: str) -> None:
    assert client.get("/health/live", headers={"X-Request-ID": given}).headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "A" * 65, "a b", "x\ty", '"}', "../x"])
def test_any_other_id_is_replaced(client: TestClient, given: str) -> None:
    answer = client.get("/health/live", headers={"X-Request-ID": given})
    assert NEW_ID.fullmatch(answer.headers["X-Request-ID"])


def test_requests_are_counted_by_template(client: TestClient) -> None:
    one, two = "1" * 28, "2" * 28
    for path in (f"/jobs/{one}", f"/jobs/{two}", "/nowhere/three", "/broken/four"):
        client.get(path)
    page = client.get("/metrics").text
    assert 'sitter_http_requests_total{method="GET",route="/jobs/{job_id}",status="404"} 2.0' in page
    assert 'sitter_http_requests_total{method="GET",route="none",status="404"}' in page
    assert 'sitter_http_requests_total{method="GET",route="/broken/{what}",status="500"}' in page
    assert not {one, two, "three", "four"} & set(re.findall(r"\w+", page))


def test_lines_tell_the_request_and_its_job_but_no_prompt_and_no_key(client: TestClient, log: Log) -> None:
    headers = {"Authorization": f"Bearer {SOME_KEY}", "X-Request-ID": "mine", "Idempotency-Key": "hushhush"}
    drawn = client.post("/generate", json={**ONE_STEP, "negative_prompt": CANARY}, headers=headers)
    assert drawn.status_code == 200
    for bad in ({"width": 1}, {CANARY: 1}, {"prompt": [CANARY]}, {"user_id": f"{CANARY} {CANARY}"}):
        assert client.post("/generate", json={**ONE_STEP, **bad}).status_code == 422
    assert client.post("/generate", json={**ONE_STEP, "user_id": "eve"}).status_code == 503
    assert client.post("/jobs", content=f'{{"prompt": "{CANARY}'.encode()).status_code == 422
    assert client.get(f"/images?words={CANARY}").status_code == 200
    assert client.get(f"/{CANARY}").status_code == 404
    assert client.get(f"/broken/{CANARY}").status_code == 500
    text = str(log)
    assert CANARY not in text
    assert "hushhush" not in text
    (line,) = [line for line in log.lines("answered") if line["request"] == "mine"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/generate", 200)
    assert line["job"] == drawn.json()["job_id"]
    (drawing,) = [line for line in log.lines("drawn") if line["job"] == drawn.json()["job_id"]]
    assert "request" not in drawing  # a job outlives its request, and has others' workers
    (failure,) = log.lines("unexpected_error")
    assert NEW_ID.fullmatch(failure["request"])


def test_uvicorn_logs_no_query(client: TestClient) -> None:
    record = logging.LogRecord(
        "uvicorn.access",
        logging.INFO,
        "",
        0,
        '%s - "%s %s HTTP/%s" %d',
        ("127.0.0.1:1", "GET", f"/images?words={CANARY}", "1.1", 200),
        None,
    )
    assert logging.getLogger("uvicorn.access").filter(record)
    assert record.getMessage() == '127.0.0.1:1 - "GET /images HTTP/1.1" 200'
