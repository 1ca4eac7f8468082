"""A model hub to ask: a real HTTP server on loopback that speaks as much of the hub's API as a download needs."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from api.engine.sources import USUAL_CONFIG

URL_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
REPOSITORIES = ("somebody/model", USUAL_CONFIG)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A model hub on this machine: serves one folder under each name, or answers every request alike."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # that it says, where those are not true
    answer: tuple[int, dict[str, str]] | None = None
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not any(name in self.path for name in REPOSITORIES):
            return self._send(404, b"")
        self.hub.asked.append(self.path)
        self.hub.tokens.add(self.headers["Authorization"])
        if self.hub.answer is not None:
            status, headers = self.hub.answer
            if not status:
                self.close_connection = True
                return  # hangs up without a word
            return self._send(status, b"", headers)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.hub.files.items())
            ]
            return self._send(200, json.dumps(tree).encode())
        if path.startswith("/api/models/"):
            sizes = {name: len(content) for name, content in self.hub.files.items()} | self.hub.sizes
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return self._send(200, json.dumps({"id": "somebody/model", "sha": COMMIT, "siblings": siblings}).encode())
        name = re.sub(r"^/[^/]+/[^/]+/resolve/[^/]*/", "", path)
        number = list(self.hub.files).index(name)
        self._send(200, self.hub.files[name], {"ETag": f'"{number:040x}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Yields a hub that the client in this process asks from now on, with the empty `cache`."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    ask(monkeypatch, hub.url, cache)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Points the hub's client at `url`, with an empty cache."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + URL_TEMPLATE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
