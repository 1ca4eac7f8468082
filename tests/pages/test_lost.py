"""The page to draw on, when not everything goes as it should: the network, the server, the session, the visitor."""

import time
from pathlib import Path

from playwright.sync_api import Page, Route, expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, draw
from tests.people import PASSWORD

LATE_SECONDS = 1.0


def expect_done(page: Page, prompt: str) -> None:
    expect(page.locator(".live", has_text=prompt).get_by_text("Done")).to_be_visible()


def test_a_script_that_comes_late_still_starts_the_stream(visits: Visits) -> None:
    def late(route: Route) -> None:
        time.sleep(LATE_SECONDS)
        route.continue_()

    with visits() as visit:
        visit.page.route("**/hx-sse.min.js*", late)
        page = visit.go("/")
        draw(page, "photo of a person, a late script")
        expect_done(page, "photo of a person, a late script")


def test_a_stream_that_could_not_begin_begins_later(visits: Visits) -> None:
    with visits() as visit:
        visit.page.route("**/page/live", lambda route: route.fulfill(status=503), times=1)
        page = visit.go("/")
        draw(page, "photo of a person, the stream away")
        expect_done(page, "photo of a person, the stream away")
        visit.refused(503)


def test_the_server_starts_again_and_the_page_goes_on(visits: Visits, tmp_path: Path) -> None:
    prompt = "photo of a person, across a restart"
    with Server(tmp_path) as server, visits(server=server) as visit:
        page = visit.go("/")
        draw(page, prompt, steps=60)
        expect(page.locator(".live", has_text=prompt).get_by_text("of 60 steps")).to_be_visible()
        server.stop()
        server.start()
        expect_done(page, prompt)
        visit.wrong.clear()  # what could not be reached meanwhile


def test_a_session_that_ends_meanwhile_loses_nothing(visits: Visits, house: Server) -> None:
    prompt = "photo of a person, signed out meanwhile"
    with visits(server=house) as visit:
        page = visit.sign_in("ada")
        draw(page, prompt)
        expect(page.locator(".live", has_text=prompt)).to_be_visible()
        page.get_by_label("What to draw").fill("half a thought")
        page.context.clear_cookies()
        page.get_by_role("button", name="Draw").click()
        page.get_by_label("Login").fill("ada")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_label("What to draw")).to_have_value("half a thought")
        expect(page.locator(".live", has_text=prompt)).to_be_visible()
        page.locator(".live", has_text=prompt).get_by_role("button", name="Cancel").click()
        expect(page.locator(".live", has_text=prompt).get_by_text("Cancelled")).to_be_visible()


def test_two_tabs_show_the_same(visits: Visits) -> None:
    prompt = "photo of a person, in two tabs"
    with visits() as visit:
        page = visit.go("/")
        with page.context.expect_page() as opened:
            page.evaluate("window.open('/')")
        other = opened.value
        other.bring_to_front()
        draw(other, prompt)
        expect_done(other, prompt)
        page.bring_to_front()
        expect_done(page, prompt)


def test_back_leads_to_a_page_that_lives(visits: Visits) -> None:
    prompt = "photo of a person, there and back"
    with visits() as visit:
        page = visit.go("/")
        draw(page, prompt)
        page.locator("header").get_by_role("link", name="Gallery").click()
        page.go_back()
        expect_done(page, prompt)
        draw(page, f"{prompt}, again")
        expect_done(page, f"{prompt}, again")
