"""Prompts that are sensitive, in a server that is killed: nothing on the disk or in its log tells them."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import CANARY, ONE_STEP, Server

HIDDEN = {**ONE_STEP, "negative_prompt": f"no {CANARY}", "tags": ["bird"]}


@pytest.mark.parametrize("settings", [{"SENSITIVE_PROMPTS": "true"}, {}], ids=["all", "those that say so"])
def test_no_file_and_no_log_tells_a_sensitive_prompt(models: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    users = {"default": str(models / "one"), "eve": str(tmp_path / "nowhere")}
    sensitive = {} if settings else {"sensitive": True}
    with Server(tmp_path, users, LOG_LEVEL="debug", **settings) as server:
        client = server.client
        made = client.post("/jobs", json={**HIDDEN, **sensitive})
        assert made.status_code == 202, made.text
        assert made.json()["prompt"] == HIDDEN["prompt"]
        failed = client.post("/jobs", json={**HIDDEN, **sensitive, "user_id": "eve"}).json()
        if settings:  # /generate has no field of its own for it
            assert server.draw().status_code == 200
        for wrong in ({"width": 1}, {"num_images": CANARY}, {CANARY: 1}, {"prompt": [CANARY]}, {"user_id": CANARY * 9}):
            assert client.post("/jobs", json={**HIDDEN, **sensitive, **wrong}).status_code == 422
        assert client.post("/jobs", content=f'{{"prompt": "{CANARY}"'.encode()).status_code == 422
        for job in (made.json()["id"], failed["id"]):
            client.get(f"/jobs/{job}/events")  # until it has ended
        (image,) = server.get(f"/jobs/{made.json()['id']}")["images"]
        assert server.get(f"/images/{image['id']}")["prompt"] == HIDDEN["prompt"]
        assert server.get(f"/images?words={CANARY}")["images"] == []
        assert len(server.get("/images?tag=bird")["images"]) == 1
        metrics = client.get("/metrics").text
        server.stop(signal.SIGKILL)  # so that SQLite's WAL is left too
        assert list(tmp_path.rglob("*-wal"))
        kept = {path: path.read_bytes().lower() for path in tmp_path.rglob("*") if path.is_file()}
        assert len([path for path in kept if path.suffix == ".png"]) == (2 if settings else 1)
        assert [path for path, content in kept.items() if CANARY.encode() in content] == []
        assert CANARY not in metrics
        assert "drawn" in server.log
