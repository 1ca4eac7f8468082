"""A picture, large: drawn again, varied, compared, copied, deleted and taken back."""

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, both_looks
from tests.waiting import until

QUICK = {"num_inference_steps": 2, "user_id": "ada", "width": 256, "height": 256}


def draw(studio: Server, prompt: str, **fields: Any) -> str:
    """Draws a picture and returns its id."""
    image_id: str = studio.drawn(**QUICK, prompt=prompt, **fields)["image_id"]
    return image_id


def is_there(studio: Server, image_id: str) -> bool:
    return studio.client.get(f"/images/{image_id}").status_code == 200


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@both_looks
def test_a_picture_is_looked_at(visits: Visits, studio: Server, size: str, dark: bool) -> None:
    older = draw(studio, "photo of sks person on a beach", negative_prompt="hat")
    newer = draw(studio, "photo of sks person in a forest")
    permissions = ["clipboard-read", "clipboard-write"]
    with visits(size, dark, permissions=permissions) as visit:
        page = visit.go(f"/picture/{older}")
        expect(page.get_by_role("heading", level=1)).to_have_text("photo of sks person on a beach")
        assert page.locator(".shown img").evaluate("image => image.complete && image.naturalWidth") == 256
        page.get_by_text("Draw it from elsewhere").click()
        visit.check()
        assert fits(page)
        curl = page.locator("section", has=page.get_by_role("heading", name="curl"))
        curl.get_by_role("button", name="Copy").click()
        expect(curl.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == curl.locator("pre").text_content()
        page.get_by_role("heading", level=1).click()
        page.keyboard.press("ArrowLeft")
        expect(page).to_have_url(f"{visit.url}/picture/{newer}")
        page.keyboard.press("ArrowRight")
        expect(page).to_have_url(f"{visit.url}/picture/{older}")
        page.get_by_text("Vary").click()
        expect(page.get_by_role("button", name="Four strengths of guidance")).to_be_visible()
        assert fits(page)
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Four strengths of guidance")).to_be_hidden()
        page.get_by_role("link", name="Same seed").click()
        expect(page.get_by_label("Seed", exact=True)).not_to_have_value("")
        expect(page.get_by_label("What to draw")).to_have_value("photo of sks person on a beach")


def test_a_picture_is_drawn_again_and_varied(visits: Visits, studio: Server) -> None:
    image = draw(studio, "photo of sks person in a library, again", seed=9)
    with visits() as visit:
        page = visit.go(f"/picture/{image}")
        page.get_by_role("button", name="Draw it again").click()
        expect(page).to_have_url(f"{visit.url}/")
        card = page.locator(".live").first
        expect(card).to_contain_text("in a library, again")
        expect(card.get_by_text("Done")).to_be_visible()
        visit.go(f"/picture/{image}")
        page.get_by_text("Vary").click()
        page.get_by_role("button", name="Four seeds beside this one").click()
        expect(page).to_have_url(f"{visit.url}/")
        expect(page.locator(".live").first.locator("img")).to_have_count(4)


def test_a_deletion_is_undone_or_not(visits: Visits, studio: Server) -> None:
    older, image = draw(studio, "photo of sks person, older"), draw(studio, "photo of sks person, to be deleted")
    with visits() as visit:
        page = visit.page
        page.clock.install()
        visit.go(f"/picture/{image}")
        page.get_by_role("button", name="Delete").click()
        undo = page.get_by_role("button", name="Undo")
        expect(undo).to_be_focused()
        visit.check()
        undo.click()
        expect(undo).to_have_count(0)
        expect(page.get_by_role("button", name="Delete")).to_be_focused()
        page.clock.fast_forward(60_000)
        assert is_there(studio, image)
        page.get_by_role("button", name="Delete").click()
        page.clock.fast_forward(8_000)
        expect(page).to_have_url(f"{visit.url}/picture/{older}")
        assert not is_there(studio, image)


def test_whoever_leaves_meant_the_deletion(visits: Visits, studio: Server) -> None:
    first, last = draw(studio, "photo of sks person, first"), draw(studio, "photo of sks person, last")
    with visits() as visit:
        page = visit.go(f"/picture/{last}")
        page.get_by_role("button", name="Delete").click()
        page.locator("header").get_by_role("link", name="Create").click()
        expect(page).to_have_url(f"{visit.url}/")
        assert not is_there(studio, last)
        visit.go(f"/picture/{first}")
        page.get_by_role("button", name="Delete").click()
        page.reload()
        until(lambda: not is_there(studio, first))
        visit.wrong.clear()  # the page that was loaded again may be gone by then


def test_without_a_script_a_picture_is_deleted(visits: Visits, studio: Server) -> None:
    draw(studio, "photo of sks person, one before")
    image = draw(studio, "photo of sks person, without a script")
    with visits(java_script_enabled=False) as visit:
        page = visit.go(f"/picture/{image}")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Delete it").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("photo of sks person, one before")
    assert not is_there(studio, image)


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_two_pictures_are_compared(visits: Visits, studio: Server, size: str) -> None:
    left = draw(studio, "photo of sks person in an office", seed=1)
    right = draw(studio, "photo of sks person in an office", seed=2)
    with visits(size, dark=size == "phone") as visit:
        page = visit.go(f"/picture/{left}")
        page.get_by_role("link", name="Compare").click()
        page.locator(f'.strip a[href$="b={right}"]').click()
        visit.check()
        assert fits(page)
        over = page.locator(".sliding figure").first
        slider = page.get_by_role("slider")
        before = over.evaluate("figure => figure.style.clipPath")
        slider.focus()
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        assert (before, over.evaluate("figure => figure.style.clipPath")) == (
            "inset(0px 50% 0px 0px)",
            "inset(0px 40% 0px 0px)",
        )
        expect(page.locator("tr.differ th")).to_have_text(["Seed"])
        page.get_by_role("link", name="Swap sides").click()
        expect(page).to_have_url(f"{visit.url}/compare?a={right}&b={left}")
    with visits(java_script_enabled=False) as visit:
        page = visit.go(f"/compare?a={left}&b={right}")
        assert [image.bounding_box() is not None for image in page.locator(".pair img").all()] == [True, True]


@pytest.mark.parametrize("size", ["laptop", "phone"])
@pytest.mark.parametrize("prompt", ['<script>alert(1)</script>" onerror="x', "שלום <b>x</b> \u202eabc", "w" * 2000])
def test_prompts_are_text(visits: Visits, studio: Server, prompt: str, size: str) -> None:
    image = draw(studio, prompt, negative_prompt=prompt)
    with visits(size) as visit:
        for path in (f"/picture/{image}", f"/compare?a={image}&b={image}", f"/picture/{image}/delete"):
            page = visit.go(path)
            assert fits(page), path
        page = visit.go(f"/picture/{image}")
        expect(page.get_by_role("heading", level=1)).to_have_text(prompt)
        page.get_by_text("Draw it from elsewhere").click()
        assert fits(page)
