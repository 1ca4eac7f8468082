"""Who a server with AUTH=open serves: this machine's programs and its own pages, and nobody else."""

import httpx2
import pytest
from fastapi import FastAPI

from api.domain.accounts import check_host, is_loopback
from api.errors import SettingsError
from api.routes.guard import add_guard
from tests import builders

pytestmark = pytest.mark.anyio

ASK = {"host": "127.0.0.1:8000"}


def site(value: str, mode: str = "cors", dest: str = "empty") -> dict[str, str]:
    return {"sec-fetch-site": value, "sec-fetch-mode": mode, "sec-fetch-dest": dest}


async def status(method: str, client: str | None, headers: dict[str, str] | list[tuple[str, str]]) -> int:
    """What a guarded app answers to a request with these headers alone."""
    app = FastAPI()
    app.add_api_route("/", lambda: {"served": True}, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    add_guard(app, builders.settings(auth="open"))
    pairs = headers.items() if isinstance(headers, dict) else headers
    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": client and (client, 40_000),
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs],
    }
    sent = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await app(scope, receive, send)  # type: ignore[arg-type]
    answered = sent[0]["status"]
    assert isinstance(answered, int)
    return answered


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
async def test_this_machine_is_served(client: str) -> None:
    assert await status("POST", client, ASK) == 200


@pytest.mark.parametrize(
    "client",
    ["10.0.0.7", "192.168.1.2", "0.0.0.0", "8.8.8.8", "fe80::1", "::", "::ffff:10.0.0.7", "testclient", "", None],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_machines_are_not(client: str | None, method: str) -> None:
    assert await status(method, client, ASK) == 403


@pytest.mark.parametrize(
    "name",
    ["Forwarded", "X-Forwarded-For", "x-forwarded-host", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Real-IP", "Via"],
)
async def test_what_came_through_a_proxy_is_not(name: str) -> None:
    assert await status("GET", "127.0.0.1", {**ASK, name.lower(): "127.0.0.1"}) == 403


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "127.3.2.1:9", "[::1]", "[::1]:8000", "localhost:1"],
)
async def test_names_of_this_machine_are_served(host: str) -> None:
    assert await status("GET", "127.0.0.1", {"host": host}) == 200
    assert await status("POST", "127.0.0.1", {"host": host, "origin": f"http://{host.lower()}"}) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1",
        "localhost:8000:80",
        "localhost:",
        "localhost ",
        "[::1",
        "::1",
        "[localhost]",
        "0.0.0.0:8000",
        "[::]",
        "10.0.0.7",
        "2130706433",
        "",
    ],
)
async def test_names_that_were_made_to_point_here_are_not(host: str) -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1, so the browser thinks it is its own server."""
    assert await status("GET", "127.0.0.1", {"host": host}) == 403
    assert await status("POST", "127.0.0.1", {"host": host, "origin": f"http://{host}", **site("same-origin")}) == 403


async def test_one_host_has_to_be_named() -> None:
    assert await status("GET", "127.0.0.1", {}) == 403
    assert await status("GET", "127.0.0.1", [("host", "localhost"), ("host", "evil.example")]) == 403


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:8000"},  # is another origin than 127.0.0.1:8000
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "chrome-extension://abc"},
        {"origin": "http://[::1"},
        {"origin": "http://127.0.0.1:8000", **site("cross-site")},
        site("cross-site"),
        site("same-site"),
        site("cross-site", "no-cors", "image"),
        site("cross-site", "navigate", "iframe"),
    ],
)
async def test_pages_of_others_are_not(method: str, headers: dict[str, str]) -> None:
    assert await status(method, "127.0.0.1", {**ASK, **headers}) == 403


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "headers", [{}, {"origin": "http://127.0.0.1:8000"}, site("same-origin"), site("none", "navigate", "document")]
)
async def test_its_own_pages_are_served(method: str, headers: dict[str, str]) -> None:
    assert await status(method, "127.0.0.1", {**ASK, **headers}) == 200


async def test_a_link_on_another_page_may_be_followed_but_no_form_sent() -> None:
    follow = {**ASK, **site("cross-site", "navigate", "document")}
    assert await status("GET", "127.0.0.1", follow) == 200
    assert await status("POST", "127.0.0.1", follow) == 403


async def test_a_refusal_says_what_to_set() -> None:
    app = FastAPI()
    add_guard(app, builders.settings(auth="open"))
    transport = httpx2.ASGITransport(app, client=("10.0.0.7", 1))
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/health")
    assert answer.status_code == 403
    assert answer.json()["error"] == "forbidden"
    assert "AUTH=required" in answer.json()["hint"]


async def test_a_server_that_asks_who_you_are_has_no_guard() -> None:
    app = FastAPI()
    add_guard(app, builders.settings(auth="required"))
    assert not app.user_middleware


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.255.0.3", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("sitter.example", False),
    ],
)
async def test_an_open_server_does_not_listen_to_others(host: str, ours: bool) -> None:
    assert is_loopback(host) == ours
    check_host(builders.settings(host=host, auth="required"))
    if ours:
        check_host(builders.settings(host=host))
    else:
        with pytest.raises(SettingsError, match="AUTH=required"):
            check_host(builders.settings(host=host))
