"""The page to draw on: from opening it to a picture that stays."""

import pytest
from playwright.sync_api import expect

from tests.pages.conftest import Visits, both_looks

PROMPT = "photo of sks person as a knight in a castle"


@both_looks
def test_type_watch_it_appear_keep_it(visits: Visits, size: str, dark: bool) -> None:
    with visits(size, dark) as visit:
        page = visit.go("/")
        visit.check()
        page.get_by_label("What to draw").fill(PROMPT)
        page.locator(".people").get_by_text("Ada", exact=True).click()
        expect(page.get_by_text("sks person is Ada")).to_be_visible()
        page.keyboard.press("Control+Enter")
        card = page.locator(".live").first
        expect(card).to_contain_text(PROMPT)
        expect(card.get_by_text("Done")).to_be_visible()
        picture = card.get_by_alt_text(PROMPT)
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") == 512
        visit.check()
        page.reload()
        expect(page.locator("#lately").get_by_alt_text(PROMPT).first).to_be_visible()


def test_a_double_click_draws_once(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        prompt = "photo of a person on a beach, twice clicked"
        page.get_by_label("What to draw").fill(prompt)
        page.get_by_role("button", name="Draw").dblclick()
        expect(page.locator(".live", has_text=prompt).get_by_text("Done")).to_be_visible()
        page.reload()
        expect(page.locator("#lately").get_by_alt_text(prompt)).to_have_count(1)


def test_cancel_acts_at_once(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        page.get_by_label("What to draw").fill("photo of a person in a city")
        page.get_by_role("slider", name="Steps").fill("150")
        page.get_by_role("button", name="Draw").click()
        card = page.locator(".live").first
        card.get_by_role("button", name="Cancel").click()
        expect(card.get_by_text("Cancelled")).to_be_visible()


def test_it_comes_back_after_a_reload(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        prompt = "photo of a person in an office, reloaded"
        page.get_by_label("What to draw").fill(prompt)
        page.get_by_role("button", name="Draw").click()
        expect(page.locator(".live", has_text=prompt)).to_be_visible()
        page.reload()
        expect(page.locator(".live, .last, #lately").get_by_text(prompt).first).to_be_attached()
        expect(page.locator("#lately").get_by_alt_text(prompt)).to_be_visible()


def test_without_a_script_a_picture_is_drawn_and_seen(visits: Visits) -> None:
    with visits(java_script_enabled=False) as visit:
        page = visit.go("/")
        prompt = "photo of a person in a library, without a script"
        page.get_by_label("What to draw").fill(prompt)
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#lately").get_by_alt_text(prompt)).to_be_visible()


@pytest.mark.parametrize(
    "prompt",
    [
        '<script>alert(1)</script><img src=x onerror="alert(2)">',
        "שלום <b>עולם</b> \u202eabc",
        "🧑‍🚀 {{ 7 * 7 }}",
        "x" * 2000,
    ],
)
def test_prompts_are_text(visits: Visits, prompt: str) -> None:
    with visits() as visit:
        page = visit.go("/")
        page.get_by_label("What to draw").fill(prompt)
        page.get_by_role("slider", name="Steps").fill("2")
        page.get_by_role("button", name="Draw").click()
        card = page.locator(".live").first
        expect(card.locator("h2")).to_have_text(prompt)
        expect(card.get_by_text("Done")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
