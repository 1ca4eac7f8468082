"""Whatever comes in, the answer is a clear error in the one shape, and the server goes on."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e import broken
from tests.e2e.server import CANARY, ONE_STEP, PATIENCE_SECONDS, Server

BODY_LIMIT = 1_000_000

FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", 7),
    ("prompt", ["a", "list"]),
    ("prompt", ""),
    ("prompt", " \n\t "),
    ("prompt", "x" * 2001),
    ("prompt", "x" * 10_000),
    ("prompt", "nul \0"),
    ("prompt", "bell \a"),
    ("prompt", "half \ud800 of a pair"),
    ("negative_prompt", 7),
    ("negative_prompt", "x" * 2001),
    ("negative_prompt", "nul \0"),
    ("negative_prompt", "\udfff"),
    ("user_id", None),
    ("user_id", 7),
    ("user_id", ""),
    ("user_id", "../ada"),
    ("user_id", ".."),
    ("user_id", "a/b"),
    ("user_id", "a\\b"),
    ("user_id", "/etc/passwd"),
    ("user_id", "a\0b"),
    ("user_id", "ada\n"),
    ("user_id", "Åda"),
    ("user_id", "\ud800"),
    ("user_id", "-ada"),
    ("user_id", "u" * 65),
    ("user_id", "u" * 300),
    ("num_inference_steps", 0),
    ("num_inference_steps", 151),
    ("num_inference_steps", -1),
    ("num_inference_steps", 1.5),
    ("num_inference_steps", "30"),
    ("num_inference_steps", True),
    ("num_inference_steps", None),
    ("num_inference_steps", 10**100),
    ("guidance_scale", 0.99),
    ("guidance_scale", 20.01),
    ("guidance_scale", "7.5"),
    ("guidance_scale", True),
    ("guidance_scale", None),
    ("guidance_scale", float("nan")),
    ("guidance_scale", float("inf")),
    ("guidance_scale", float("-inf")),
    ("width", 255),
    ("width", 1025),
    ("width", 512.5),
    ("width", "512"),
    ("width", True),
    ("width", float("inf")),
    ("height", 255),
    ("height", 1025),
    ("height", None),
    ("height", False),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("seed", "42"),
    ("seed", True),
    ("seed", float("nan")),
    ("scheduler", "pndm"),
    ("scheduler", ""),
    ("scheduler", 1),
    ("num_images", 0),
    ("num_images", 5),
    ("num_images", "2"),
    ("num_images", True),
    ("nobody_knows_this", 1),
    ("__proto__", {}),
]

BODIES: list[tuple[str, bytes, int]] = [
    ("nothing", b"", 422),
    ("broken JSON", b'{"prompt": "' + CANARY.encode(), 422),
    ("two documents", b'{"prompt": "a"} {}', 422),
    ("not UTF-8", b'{"prompt": "\xff\xfe"}', 400),
    ("null", b"null", 422),
    ("a list", b'[{"prompt": "a"}]', 422),
    ("a string", f'"{CANARY}"'.encode(), 422),
    ("no prompt", b"{}", 422),
    ("a number over all bounds", b'{"prompt": "a", "guidance_scale": 1e400}', 422),
    ("a number with 4301 digits", b'{"prompt": "a", "seed": ' + b"9" * 4301 + b"}", 400),
    ("100,000 brackets", b'{"prompt": ' + b"[" * 100_000, 400),
    ("100,000 closed brackets", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
]

PATHS = [
    ("GET", "/generate", 405),
    ("PUT", "/generate", 405),
    ("POST", "/health", 405),
    ("PATCH", "/cache", 405),
    ("GET", "/nowhere", 404),
    ("GET", "/static/docs/../../../config.py", 404),
    ("GET", "/static/docs/%2e%2e/%2e%2e/%2e%2e/config.py", 404),
    ("GET", "/static/docs/nothing.js", 404),
    ("POST", "/static/docs/favicon.svg", 405),
    ("TRACE", "/generate", 405),
]


@pytest.fixture(scope="module", autouse=True)
def _it_still_draws(server: Server) -> Iterator[None]:
    yield
    server.drawn()
    assert '"level": "error"' not in server.log


def assert_error(answer: httpx2.Response, status: int, code: str) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, str] = answer.json()
    assert body.keys() == {"error", "detail", "hint"}
    assert body["error"] == code
    assert body["detail"].strip()
    assert body["hint"].strip()
    assert CANARY not in answer.text
    return body


def post(server: Server, body: bytes | Iterator[bytes], kind: str = "application/json") -> httpx2.Response:
    return server.client.post("/generate", content=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("path", ["/generate", "/generate/image"])
@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_field_that_does_not_fit(server: Server, path: str, field: str, value: Any) -> None:
    body = json.dumps({**ONE_STEP, field: value}).encode()
    answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    error = assert_error(answer, 422, "invalid_request")
    assert field in error["detail"]


@pytest.mark.parametrize(("body", "status"), [pytest.param(body, status, id=name) for name, body, status in BODIES])
def test_a_body_that_is_no_request(server: Server, body: bytes, status: int) -> None:
    assert_error(post(server, body), status, "bad_request" if status == 400 else "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense", ""])
def test_another_content_type(server: Server, kind: str) -> None:
    assert_error(post(server, json.dumps(ONE_STEP).encode(), kind), 422, "invalid_request")


def test_a_byte_order_mark_does_no_harm(server: Server) -> None:
    assert post(server, b"\xef\xbb\xbf" + json.dumps(ONE_STEP).encode()).status_code == 200


def test_of_a_field_given_twice_the_last_counts(server: Server) -> None:
    text = json.dumps({**ONE_STEP, "seed": 1})
    answer = post(server, text.replace('"seed": 1', '"seed": 1, "seed": 2').encode())
    assert answer.json()["seed"] == 2


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_a_path_or_method_that_is_not_there(server: Server, method: str, path: str, status: int) -> None:
    code = {404: "not_found", 405: "method_not_allowed"}[status]
    assert_error(server.client.request(method, path), status, code)


@pytest.mark.parametrize("path", ["/health", "/generate", "/nowhere"])
def test_head_has_no_body(server: Server, path: str) -> None:
    answer = server.client.head(path)
    assert 400 <= answer.status_code < 500
    assert answer.content == b""


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        ({"width": 257}, "256 × 256"),
        ({"height": 1023}, "256 × 1024"),
        ({"width": 500, "height": 600}, "496 × 608"),
    ],
)
def test_a_size_the_model_cannot_draw(server: Server, change: dict[str, int], nearest: str) -> None:
    assert nearest in assert_error(server.draw(**change), 422, "unsupported_size")["hint"]


def test_seeds_that_run_over(server: Server) -> None:
    assert_error(server.draw(seed=2**63 - 2, num_images=3), 422, "invalid_request")


def test_the_image_endpoint_answers_with_one_picture(server: Server) -> None:
    answer = server.client.post("/generate/image", json={**ONE_STEP, "num_images": 2})
    assert_error(answer, 422, "invalid_request")


@pytest.mark.parametrize("size", [BODY_LIMIT + 1, 20 * BODY_LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(server: Server, size: int, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * (size - 14) + b'"}'
    pieces = (body[at : at + 65536] for at in range(0, size, 65536))
    assert_error(post(server, pieces if chunked else body), 413, "body_too_large")


def test_a_body_just_under_the_limit_is_read(server: Server) -> None:
    body = b'{"prompt": "' + b"x" * (BODY_LIMIT - 14) + b'"}'
    assert_error(post(server, body), 422, "invalid_request")


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 2000000\r\n\r\n", b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"],
)
def test_a_body_that_does_not_come(server: Server, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + head)
    server.drawn()


@pytest.mark.parametrize("line", [b"GET", b"\x16\x03\x01\x02\x00\x01", b"POST /generate HTTP/1.1\r\nContent-Length: x"])
def test_what_is_not_http(server: Server, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(line + b"\r\n\r\n")
        connection.settimeout(60)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("user", "detail"),
    [
        ("missing", "is not there"),
        ("truncated", "cut short"),
        ("pickled", "not a safetensors file"),
        ("pickled-bin", "no safetensors file"),
        ("hub", "hub cannot be reached"),
        ("lora-missing", "is not there"),
        ("lora-pickle", "not a safetensors file"),
        *((name, "not a safetensors file") for name in broken.PICKLES),
    ],
)
def test_a_broken_model(server: Server, models: Path, user: str, detail: str) -> None:
    server.clear_cache()
    first = assert_error(server.draw(user_id=user), 503, "model_unavailable")
    assert detail in first["detail"]
    attempts = server.log.count('"event": "model_unavailable"')
    assert assert_error(server.draw(user_id=user), 503, "model_unavailable") == first
    assert server.log.count('"event": "model_unavailable"') == attempts, "it was tried again"
    server.drawn()
    assert not (models / broken.MARK).exists()


def test_a_mended_model_draws_after_the_cache_is_emptied(server: Server, models: Path) -> None:
    unet = models / "truncated" / broken.UNET
    cut = unet.read_bytes()
    server.clear_cache()
    assert_error(server.draw(user_id="truncated"), 503, "model_unavailable")
    try:
        shutil.copy(models / "one" / broken.UNET, unet)
        assert_error(server.draw(user_id="truncated"), 503, "model_unavailable")  # from memory
        server.clear_cache()
        server.drawn(user_id="truncated")
    finally:
        unet.write_bytes(cut)
        server.clear_cache()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("size", "pictures"), [("64k", 1), ("256k", 4)])
def test_a_full_disk(server: Server, output: Path, size: str, pictures: int) -> None:
    with small_disk(output, size):
        error = assert_error(server.draw(num_images=pictures), 507, "storage_full")
        assert "OUTPUT_DIR" in error["hint"]
        assert list(output.iterdir()) == []
        for job in server.client.get("/jobs", params={"status": "queued"}).json()["jobs"]:
            server.client.post(f"/jobs/{job['id']}/cancel").raise_for_status()  # it would be drawn once there is room
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (answer := server.draw()).status_code == 507:  # it looks at its disk once in a while
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text


def test_no_prompt_is_in_the_log(server: Server) -> None:
    server.drawn(negative_prompt=CANARY)
    server.draw(prompt=CANARY, width=257)
    server.draw(prompt=CANARY, user_id="missing")
    server.draw(prompt=CANARY + "\0")
    server.draw(prompt={CANARY: CANARY})
    server.client.get(f"/generate?prompt={CANARY}")
    assert "drawn" in server.log
    assert CANARY not in server.log
