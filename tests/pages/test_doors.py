"""Who comes in by the pages: signing in, forged forms, what is others' and what is for administrators."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx2
import pytest
from fastapi.routing import APIRoute

from api.routes.pages import ROOMS
from tests.e2e.server import PATIENCE_SECONDS, Server
from tests.pages.conftest import bearer
from tests.people import PASSWORD

NOT_THERE = f"{0xDEAD:028x}"
FILLED = {"user_id": "ada", "version": "1", "name": "ada", "number": "1"}
Enter = Callable[[str], AbstractContextManager[httpx2.Client]]


def addresses(method: str) -> list[str]:
    """Every address of a page, with something in the place of its parameters."""
    routes = [route for room in ROOMS for route in room.router.routes if isinstance(route, APIRoute)]

    def filled(path: str) -> str:
        return re.sub(r"{(\w+)[^}]*}", lambda name: FILLED.get(name[1], NOT_THERE), path)

    return sorted({filled(route.path) for route in routes if method in (route.methods or ())})


@contextmanager
def browser_of(server: Server) -> Iterator[httpx2.Client]:
    """Somebody who keeps cookies and runs no script."""
    url = f"http://127.0.0.1:{server.port}"
    with httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
        yield client


@pytest.fixture
def enter(house: Server) -> Enter:
    """Signs somebody in: `with enter("ada") as client: …`."""

    @contextmanager
    def entered(login: str) -> Iterator[httpx2.Client]:
        with browser_of(house) as client:
            answer = client.post("/sign-in", data={"login": login, "password": PASSWORD, "next": "/account"})
            assert (answer.status_code, answer.headers["Location"]) == (303, "/account")
            yield client

    return entered


def token_of(client: httpx2.Client) -> str:
    found = re.search(r'name="csrf_token" value="([^"]+)"', client.get("/account").text)
    assert found is not None
    return found[1]


def test_every_page_asks_who_comes(house: Server) -> None:
    with browser_of(house) as client:
        for path in addresses("GET"):
            answer = client.get(path)
            if path in ("/sign-in", "/setup"):
                assert answer.status_code == 200, path
            elif path == "/page/live":
                assert answer.status_code == 401
            else:
                assert (answer.status_code, answer.headers["Location"][:14]) == (303, "/sign-in?next="), path


def test_a_form_without_its_token_does_nothing(enter: Enter) -> None:
    with enter("root") as client:
        for path in addresses("POST"):
            if path == "/sign-in":
                continue
            for form in ({}, {"csrf_token": "forged"}, {"csrf_token": ""}):
                answer = client.post(path, data=form)
                assert (answer.status_code, "CSRF" in answer.text) == (403, True), path
        assert client.get("/account").status_code == 200


def test_managing_is_for_administrators(enter: Enter) -> None:
    with enter("ada") as client:
        token = token_of(client)
        for path in addresses("GET"):
            if "manage" in path:
                answer = client.get(path)
                assert (answer.status_code, "for administrators" in answer.text) == (403, True), path
        for path in addresses("POST"):
            if "manage" in path:
                assert client.post(path, data={"csrf_token": token}).status_code == 403, path
        assert "/manage" not in client.get("/account").text


def test_what_is_others_is_not_there(house: Server, enter: Enter) -> None:
    made = house.client.post("/me/keys", json={"name": "of root"}, headers=bearer(house)).json()
    job = house.client.post("/jobs", json={"prompt": "a castle"}, headers=bearer(house)).json()
    with enter("ada") as client:
        form = {"csrf_token": token_of(client)}
        for path in (f"/account/keys/{made['id']}/revoke", f"/page/jobs/{job['id']}/cancel"):
            assert client.post(path, data=form).status_code == 404
        assert "of root" not in client.get("/account").text
    assert house.client.get("/me", headers={"Authorization": f"Bearer {made['key']}"}).status_code == 200


def test_a_wrong_password_is_told_and_slowed_down(house: Server) -> None:
    with browser_of(house) as client:
        form = {"login": "<i>eve</i>", "password": "wrong", "next": "/account"}
        answers = [client.post("/sign-in", data=form) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [401] * 6 + [429]
    assert "The login or the password is wrong." in answers[0].text
    assert 'value="&lt;i&gt;eve&lt;/i&gt;"' in answers[0].text
    assert 'name="next" value="/account"' in answers[0].text
    assert re.search(r"Try again in \d+ s\.", answers[-1].text)
    assert int(answers[-1].headers["Retry-After"]) > 0


def test_nobody_is_led_away_from_this_server(house: Server) -> None:
    with browser_of(house) as client:
        for elsewhere in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"):
            form = {"login": "ada", "password": PASSWORD, "next": elsewhere}
            assert client.post("/sign-in", data=form).headers["Location"] == "/"
            assert client.get("/sign-in", params={"next": elsewhere}).headers["Location"] == "/"
        assert client.get("/sign-in?next=/sign-in").headers["Location"] == "/"


def test_no_other_site_signs_anybody_in(house: Server) -> None:
    with browser_of(house) as client:
        form = {"login": "ada", "password": PASSWORD}
        answer = client.post("/sign-in", data=form, headers={"Sec-Fetch-Site": "cross-site"})
        assert (answer.status_code, client.cookies.get("sitter_session")) == (403, None)


def test_whoever_is_signed_out_comes_back_to_where_they_were(house: Server) -> None:
    with browser_of(house) as client:
        asked = client.get("/manage/requests?user=ada&words=a%20b")
        assert asked.headers["Location"] == "/sign-in?next=/manage/requests%3Fuser%3Dada%26words%3Da%2520b"
        sent = client.post("/account/keys", headers={"Referer": f"http://127.0.0.1:{house.port}/account"})
        assert sent.headers["Location"] == "/sign-in?next=/account"
        part = client.get("/page/manage/now", headers={"HX-Request": "true", "HX-Current-URL": "http://x/manage?a=1"})
        assert part.headers["HX-Redirect"] == "/sign-in?next=/manage%3Fa%3D1"
