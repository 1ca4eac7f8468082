"""Webhooks of a real server to a real receiver."""

import json
import time
from pathlib import Path

from standardwebhooks import Webhook

from tests.e2e.server import CANARY, ONE_STEP, PATIENCE_SECONDS, Server
from tests.peers import Peer, peer


def wait_for(receiver: Peer, hits: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(receiver.hits) < hits:
        assert time.monotonic() < deadline, "no webhook came"
        time.sleep(0.05)


def test_a_receiver_is_told_and_fetches_the_picture(models: Path, tmp_path: Path) -> None:
    users = {"default": str(models / "one"), "eve": str(tmp_path / "nowhere")}
    with peer() as receiver, Server(tmp_path, users, WEBHOOK_ALLOW_PRIVATE="true") as server:
        body = {**ONE_STEP, "webhook_url": receiver.url()}
        made = server.client.post("/jobs", json=body)
        assert made.status_code == 202, made.text
        wait_for(receiver, 1)
        (hit,) = receiver.hits
        secret = server.get("/me/webhook-secret")["secret"]
        payload = Webhook(secret).verify(hit.body, hit.headers)
        assert (payload["type"], payload["data"]["id"]) == ("job.succeeded", made.json()["id"])
        picture = server.client.get(payload["data"]["images"][0]["url"])
        assert picture.content.startswith(b"\x89PNG")
        failed = server.client.post("/jobs", json={**body, "user_id": "eve"}).json()
        wait_for(receiver, 2)
        told = json.loads(receiver.hits[1].body)
        assert (told["type"], told["data"]["id"]) == ("job.failed", failed["id"])
        assert told["data"]["error"]["error"] == "model_unavailable"
        assert CANARY not in f"{receiver.hits}"
        assert server.stop() == 0


def test_nothing_is_sent_into_ones_own_network(models: Path, tmp_path: Path) -> None:
    with (
        peer() as inside,
        Server(tmp_path, {"default": str(models / "one")}) as server,
    ):
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
            refused = server.client.post("/jobs", json={**ONE_STEP, "webhook_url": f"http://{host}:{inside.port}/"})
            assert (refused.status_code, refused.json()["error"]) == (422, "address_not_public")
        for host in ("0x7f.1", "2130706433", "127.1"):  # only the resolver reads these as numbers
            made = server.client.post("/jobs", json={**ONE_STEP, "webhook_url": f"http://{host}:{inside.port}/"})
            assert made.status_code == 202
            server.client.get(f"/jobs/{made.json()['id']}/events")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while server.log.count("webhook_refused") < 3:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.05)
        assert inside.hits == []
        assert server.stop() == 0
