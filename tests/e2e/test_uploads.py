"""Models that come in pieces, or from a hub, to a real server that is killed, cut off and short of room."""

import signal
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.config import ROOT
from api.store.models import sha256
from tests.e2e.server import PATIENCE_SECONDS, SITTER, Server
from tests.hub import COMMIT, Hub
from tests.waiting import until

LORA = ROOT / "models/sitters/ada/pytorch_lora_weights.safetensors"
WEIGHTS = LORA.read_bytes()
MIDDLE = len(WEIGHTS) // 2
FORM = {"name": "eve", "user_id": "eve", "consent": "true"}
TUS = {"Tus-Resumable": "1.0.0"}


def begun(server: Server, length: int = len(WEIGHTS)) -> str:
    answer = server.client.post("/uploads", headers={**TUS, "Upload-Length": str(length)})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


def send(server: Server, where: str, offset: int, piece: bytes) -> httpx2.Response:
    said = {"Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    return server.client.patch(where, content=piece, headers={**TUS, **said})


def offset(server: Server, where: str) -> int:
    return int(server.client.head(where, headers=TUS).raise_for_status().headers["Upload-Offset"])


def half_sent(server: Server, where: str) -> socket.socket:
    """A connection on which the first half has come, and the rest never does."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_SECONDS)
    head = f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\nUpload-Offset: 0\r\nContent-Length: {len(WEIGHTS)}\r\n"
    connection.sendall(f"{head}Content-Type: application/offset+octet-stream\r\n\r\n".encode() + WEIGHTS[:MIDDLE])
    until(lambda: offset(server, where) == MIDDLE)
    return connection


def taken(server: Server, where: str, **fields: Any) -> httpx2.Response:
    form = {**FORM, "upload": where.rpartition("/")[2], "filename": LORA.name, **fields}
    return server.client.post("/models", data=form)


def test_an_upload_survives_whatever_ends_its_connection(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        where = begun(server)
        with half_sent(server, where):
            assert send(server, where, MIDDLE, b"x").status_code == 409  # while the other is at it
        until(lambda: send(server, where, MIDDLE, WEIGHTS[MIDDLE : MIDDLE + 1000]).status_code == 204)
        assert "unexpected_error" not in server.log
        cut = begun(server)
        with half_sent(server, cut):
            server.stop(signal.SIGKILL)  # between two pieces of the one, and in the middle of a piece of the other
        server.start()
        assert (offset(server, where), offset(server, cut)) == (MIDDLE + 1000, MIDDLE)
        rest = send(server, where, MIDDLE + 1000, WEIGHTS[MIDDLE + 1000 :])
        assert (rest.status_code, rest.headers["Upload-Offset"]) == (204, str(len(WEIGHTS)))
        assert taken(server, where, sha256=sha256(WEIGHTS[1:])).status_code == 422
        made = taken(server, where, sha256=sha256(WEIGHTS))
        assert made.status_code == 201, made.text
        (version,) = server.get(f"{made.headers['Location']}/versions")["versions"]
        assert version["sha256"] == sha256(WEIGHTS)
        assert server.drawn(user_id="eve")["model_id"] == "eve/eve@1"
        assert server.client.head(where).status_code == 404, "it is used"
        assert taken(server, where).status_code == 404
        assert send(server, cut, MIDDLE, WEIGHTS[MIDDLE:]).status_code == 204
        assert taken(server, cut).json()["versions"] == 1, "the same once more"
        assert not list((tmp_path / "data/uploads").glob("*.*.*"))
        assert server.stop() == 0


def test_a_full_disk_leaves_the_offset_true(tmp_path: Path) -> None:
    most = 4_096_000  # bytes of a file, by the limit of the process: a disk has no room for more
    limited = ("bash", "-c", f'ulimit -f {most // 1024}; exec "$@"', "-")
    with Server(tmp_path, command=(*limited, *SITTER, "serve"), WORKERS="0") as server:
        where, piece = begun(server, 2 * most), bytes(range(256)) * (most // 256)
        assert send(server, where, 0, piece[:1000]).status_code == 204
        full = send(server, where, 1000, piece[1000:] + piece[:1000])
        assert (full.status_code, full.json()["error"]) == (507, "storage_full")
        assert "DATA_DIR" in full.json()["hint"]
        there = offset(server, where)
        (part,) = (tmp_path / "data/uploads").glob("*.part")
        assert part.read_bytes() == piece[:there]
        assert 1000 < there <= most
        assert server.client.delete(where).status_code == 204
        assert server.stop() == 0


@pytest.fixture
def hub_server(hub: Hub, tmp_path: Path) -> Server:
    return Server(tmp_path, HF_ENDPOINT=hub.url, NO_PROXY="127.0.0.1", HUB_TIMEOUT_SECONDS="60", WORKERS="0")


def test_a_model_of_the_hub_is_checked_and_kept_as_one_that_was_sent(hub_server: Server, hub: Hub) -> None:
    hub.files = {"README.md": b"# Ada", "run.py": b"1/0", LORA.name: WEIGHTS}
    form = {**FORM, "hub": "somebody/model", "revision": COMMIT}
    with hub_server as server:
        server.get("/models")
        assert hub.asked == [], "nobody asked for anything of the hub"
        made = server.client.post("/models", data=form)
        assert made.status_code == 201, made.text
        (version,) = server.get(f"{made.headers['Location']}/versions")["versions"]
        assert (version["sha256"], version["files"].keys()) == (sha256(WEIGHTS), {LORA.name})
        assert version["parameters"]["hub"] == f"somebody/model@{COMMIT}"
        assert not any("README" in asked or ".py" in asked for asked in hub.asked)
        hub.files[LORA.name] = b"\x80\x05]q\x00."
        refused = server.client.post("/models", data=form)
        assert (refused.status_code, refused.json()["error"]) == (422, "invalid_request")
        for status, code, told in ((403, "GatedRepo", 403), (404, "RepoNotFound", 404), (500, "Down", 503)):
            hub.answer = status, {"X-Error-Code": code}
            assert server.client.post("/models", data=form).status_code == told
        assert len(server.get(f"{made.headers['Location']}/versions")["versions"]) == 1
        assert len(list((server.output.parent / "data/models").iterdir())) == 1
        assert server.stop() == 0
