"""A real browser before a real server. Whatever a page does wrong quietly, its visit says at the end."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from tests.e2e.server import Server
from tests.people import PASSWORD

AXE = Path(__file__).with_name("axe.min.js")
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SERIOUS = {"serious", "critical"}
PATIENCE = 180_000.0  # milliseconds until something that never happens fails a test, on a machine that is busy
SIZES = {"laptop": (1280, 860), "phone": (390, 844)}
# Each size and each light once: what is laid out does not depend on the light, nor the contrast on the size.
both_looks = pytest.mark.parametrize(("size", "dark"), [("laptop", False), ("phone", True)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; `.ci/run` installs it. Not for the session: its driver holds the event loop of other tests."""
    if CHROMIUM is None:
        pytest.fail("Chromium is not installed (Debian: apt install chromium)")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the bundled models, for the pages alone."""
    with Server(tmp_path_factory.mktemp("studio")) as running:
        yield running


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with AUTH=required that draws nothing, so that jobs wait. Root administrates; Ada and Bo are users."""
    folder = tmp_path_factory.mktemp("house")
    with Server(folder, AUTH="required", WORKERS="0", HF_TOKEN="hf_hunter2") as running:
        [token] = re.findall(r"/setup#(\S+)", running.log)
        root = {"token": token, "user_id": "root", "password": PASSWORD}
        running.client.post("/setup", json=root).raise_for_status()
        for user_id in ("ada", "bo"):
            add_user(running, user_id)
        yield running


def bearer(server: Server, login: str = "root") -> dict[str, str]:
    """Headers that say who asks the JSON API."""
    signed_in = server.client.post("/auth/login", json={"login": login, "password": PASSWORD}).raise_for_status()
    return {"Authorization": f"Bearer {signed_in.json()['access_token']}"}


def add_user(server: Server, user_id: str) -> None:
    """Makes a user with PASSWORD."""
    new = {"id": user_id, "name": user_id.title(), "password": PASSWORD}
    server.client.post("/admin/users", json=new, headers=bearer(server)).raise_for_status()


@dataclass
class Visit:
    """A page in a browser, and what went wrong on it."""

    page: Page
    url: str
    wrong: list[str] = field(default_factory=list)

    def go(self, path: str) -> Page:
        """Opens a page of the server."""
        self.page.goto(self.url + path)
        return self.page

    def sign_in(self, login: str, path: str = "/", password: str = PASSWORD) -> Page:
        """Opens a page that asks who comes, and says it."""
        self.go(path)
        self.page.get_by_label("Login").fill(login)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()
        return self.page

    def refused(self, status: int) -> None:
        """Says that an answer of this status was meant: the browser writes each on its console."""
        said = [one for one in self.wrong if f"the server responded with a status of {status}" in one]
        assert said, f"nothing was answered {status}"
        self.wrong = [one for one in self.wrong if one not in said]

    def check(self) -> None:
        """Fails when axe-core finds something serious on the page that is open."""
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found: dict[str, Any] = self.page.evaluate("axe.run()")
        serious = [f"{one['id']}: {one['nodes'][0]['html']}" for one in found["violations"] if one["impact"] in SERIOUS]
        assert not serious, serious


def draw(page: Page, prompt: str, steps: int = 2) -> Locator:
    """Has the page to draw on draw, and returns the card of it."""
    page.get_by_label("What to draw").fill(prompt)
    page.get_by_role("slider", name="Steps").fill(str(steps))
    page.get_by_role("button", name="Draw").click()
    return page.locator(".live", has_text=prompt)


Visits = Callable[..., AbstractContextManager[Visit]]


@pytest.fixture
def visits(browser: Browser, studio: Server) -> Visits:
    """Opens a browser window of its own: `with visits("phone", dark=True) as visit: …`."""

    @contextmanager
    def opened(size: str = "laptop", dark: bool = False, server: Server = studio, **options: Any) -> Iterator[Visit]:
        width, height = SIZES[size]
        scheme: Literal["dark", "light"] = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        context.set_default_timeout(PATIENCE)
        visit = Visit(context.new_page(), f"http://127.0.0.1:{server.port}")
        _listen(visit)
        try:
            yield visit
        finally:
            context.close()
        assert not visit.wrong, visit.wrong

    return opened


def _listen(visit: Visit) -> None:
    host = urlsplit(visit.url).netloc

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):  # Content-Security-Policy is among them
            visit.wrong.append(f"console: {message.text}")

    def request(sent: Request) -> None:
        parts = urlsplit(sent.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            visit.wrong.append(f"asked {sent.url}")

    visit.page.on("console", console)
    visit.page.on("pageerror", lambda error: visit.wrong.append(f"error: {error}"))
    visit.page.on("request", request)
