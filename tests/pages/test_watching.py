"""A picture is watched while it is drawn: with eyes on a phone, with a keyboard, with a screen reader."""

import re

from playwright.sync_api import Route, expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, draw


def test_the_button_is_at_hand_and_what_it_draws_comes_into_view(visits: Visits) -> None:
    with visits("phone") as visit:
        page = visit.go("/")
        page.get_by_label("What to draw").scroll_into_view_if_needed()
        expect(page.get_by_role("button", name="Draw")).to_be_in_viewport(ratio=1)
        first = draw(page, "photo of a person, for a phone", 1)
        expect(first.get_by_text("Done")).to_be_visible()
        second = draw(page, "photo of a person, for a phone again", 1)
        expect(second.locator(".canvas")).to_be_in_viewport(ratio=1)
        page.set_viewport_size({"width": 1366, "height": 600})
        page.reload()
        expect(page.get_by_role("button", name="Draw")).to_be_in_viewport(ratio=1)


def test_steps_are_not_read_out_one_by_one(visits: Visits) -> None:
    with visits() as visit:
        card = draw(visit.go("/"), "photo of a person, read out", 150)
        expect(card.get_by_text("of 150 steps")).to_be_visible()
        expect(card.get_by_role("status")).to_match_aria_snapshot("- status: Being drawn")
        card.get_by_role("button", name="Cancel").click()
        expect(card.get_by_role("status")).to_match_aria_snapshot("- status: Cancelled")


def test_the_keyboard_stays_where_the_button_was(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        card = draw(page, "photo of a person, watched by keyboard", 12)
        card.get_by_role("button", name="Cancel").focus()
        expect(card.get_by_role("link", name="Look closer")).to_be_focused()
        again = draw(page, "photo of a person, stopped by keyboard", 150)
        again.get_by_role("button", name="Cancel").press("Enter")
        expect(again.get_by_text("Cancelled")).to_be_visible()
        expect(again).to_be_focused()


def test_the_preview_stays_until_the_picture_is_there(visits: Visits) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    with visits() as visit:
        page = visit.go("/")
        page.route(re.compile(r"/images/\w+/file$"), hold)
        card = draw(page, "photo of a person, far away", 30)
        expect(card.locator(".sharpening")).to_be_visible()
        expect(card.get_by_text("Done")).to_be_visible()
        expect(card.locator(".canvas a img")).to_have_css("background-image", re.compile("data:image/jpeg"))
        for route in held:
            route.continue_()


def test_a_key_that_is_held_draws_once(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        page.get_by_label("What to draw").fill("photo of a person, held down")
        page.get_by_role("slider", name="Steps").fill("1")
        page.keyboard.down("Control")
        for _ in range(20):  # after the first, each is a repetition
            page.keyboard.down("Enter")
            page.wait_for_timeout(30)
        page.keyboard.up("Enter")
        page.keyboard.up("Control")
        expect(page.locator(".live", has_text="held down").get_by_text("Done")).to_have_count(1)
        page.reload()
        expect(page.locator("#lately").get_by_alt_text("photo of a person, held down")).to_have_count(1)


def test_times_are_the_reader_s_and_an_address_that_leads_nowhere_says_so(visits: Visits, studio: Server) -> None:
    image = studio.drawn(prompt="photo of a person, in Tokyo", user_id="default")["image_id"]
    with visits(timezone_id="Asia/Tokyo") as visit:
        told = visit.go(f"/picture/{image}").locator(".facts time").inner_text()
        assert "UTC" not in told
        expect(visit.go("/gallery").locator("#details time")).to_have_text(told)
        visit.page.keyboard.press("?")
        expect(visit.page.locator("#keys")).to_be_visible()
        page = visit.go("/galery")
        expect(page.get_by_role("heading", name="There is no such page.")).to_be_visible()
        visit.check()
        visit.refused(404)
    assert studio.client.get("/galery").json()["error"] == "not_found"
