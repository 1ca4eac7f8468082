"""Whom a real server serves: with AUTH=open this machine alone, with AUTH=required whoever has a credential."""

import re
import socket
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.server import API, PATIENCE_SECONDS, SITTER, Server
from tests.e2e.test_start import run

UVICORN = (sys.executable, "-m", "uvicorn", "main:app", "--host", "0.0.0.0", "--port", "{port}")
PASSWORD = "correct horse battery"


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing; names the address that others would see
        except OSError:
            pytest.skip("this machine has no network")
        address: str = asked.getsockname()[0]
    return address


def test_an_open_server_does_not_start_where_others_reach_it() -> None:
    ended = run(*SITTER, "serve", HOST="0.0.0.0", PORT="0")
    assert ended.returncode == 2
    assert "AUTH=required" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_open_server_on_every_address_serves_this_machine_alone(tmp_path: Path) -> None:
    with Server(tmp_path, command=UVICORN, cwd=API) as server:
        assert server.client.get("/health").status_code == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"X-Forwarded-For": "127.0.0.1"}):
            assert server.client.get("/health", headers=headers).status_code == 403
        refused = httpx2.get(f"http://{own_address()}:{server.port}/health", trust_env=False)
        assert (refused.status_code, refused.json()["error"]) == (403, "forbidden")
        assert "AUTH=required" in refused.json()["hint"]


def test_an_open_server_refuses_a_proxy_that_is_believed(tmp_path: Path) -> None:
    with Server(tmp_path, WORKERS="0", TRUSTED_PROXIES="127.0.0.0/8") as server:
        for name, value in (("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Proto", "https")):
            assert server.client.get("/health", headers={name: value}).status_code == 403


def test_a_proxy_elsewhere_is_believed_where_it_is_named(tmp_path: Path) -> None:
    """Its clients are told apart, and their cookies are for HTTPS alone; what others say of themselves is not heard."""
    proxy = own_address()
    with Server(tmp_path, AUTH="required", HOST="0.0.0.0", WORKERS="0", TRUSTED_PROXIES=proxy) as server:
        [token] = re.findall(r"/setup#(\S+)", server.log)
        setup = {"token": token, "user_id": "root", "password": PASSWORD}
        assert server.client.post("/setup", json=setup).status_code == 204

        def sign_in(host: str, client: str, password: str = PASSWORD) -> httpx2.Response:
            headers = {"X-Forwarded-For": client, "X-Forwarded-Proto": "https"}
            body = {"login": "root", "password": password, "session": True}
            url = f"http://{host}:{server.port}/auth/login"
            return httpx2.post(url, json=body, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS)

        assert "Secure" in sign_in(proxy, "192.0.2.1").headers["Set-Cookie"]
        assert "Secure" not in sign_in("127.0.0.1", "192.0.2.1").headers["Set-Cookie"]
        assert [sign_in(proxy, "192.0.2.1", "wrong").status_code for _ in range(7)] == [401] * 6 + [429]
        assert sign_in(proxy, "192.0.2.2").status_code == 200
        assert '"address": "192.0.2.1"' in server.log


def test_the_first_administrator_and_a_user_find_their_way(tmp_path: Path) -> None:
    """The link that is printed, a user made by it, their key: what the README tells."""
    required: dict[str, Any] = {"AUTH": "required", "HOST": "0.0.0.0", "WORKERS": "0"}
    beside: dict[str, Any] = {"DATA_DIR": str(tmp_path / "data")}
    with Server(tmp_path, **required) as server:
        [token] = re.findall(r"/setup#(\S+)", server.log)
        assert server.client.get("/me").status_code == 401
        setup = {"token": token, "user_id": "root", "password": PASSWORD}
        assert server.client.post("/setup", json=setup).status_code == 204
        signed_in = server.client.post("/auth/login", json={"login": "root", "password": PASSWORD}).json()
        root = {"Authorization": f"Bearer {signed_in['access_token']}"}
        assert server.client.post("/admin/users", json={"id": "ada"}, headers=root).status_code == 201
        made = run(*SITTER, "keys", "add", "ada", **beside)
        assert made.returncode == 0, made.stderr
        ada = {"Authorization": f"Bearer {made.stdout.strip()}"}
        assert server.client.get("/me", headers=ada).json()["user_id"] == "ada"
        assert server.client.get("/admin/users", headers=ada).status_code == 403
        assert run(*SITTER, "audit", "verify", **beside).returncode == 0
        told = server.log
        for secret in (PASSWORD, made.stdout.strip(), signed_in["access_token"]):
            assert secret not in told
        assert server.stop() == 0
    with Server(tmp_path, **required) as again:
        assert "/setup#" not in again.log
        assert again.client.get("/me", headers=ada).status_code == 200
        assert again.client.get("/me", headers=root).status_code == 200
        assert again.stop() == 0
