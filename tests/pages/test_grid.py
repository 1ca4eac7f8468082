"""A grid of values: planned, drawn, watched, taken along."""

import io

from PIL import Image
from playwright.sync_api import Page, expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, both_looks


def fill(page: Page, prompt: str, x: str, x_values: str, y: str, y_values: str) -> None:
    page.get_by_label("What to draw").fill(prompt)
    for side, axis, values in (("x", x, x_values), ("y", y, y_values)):
        page.locator(f"select[name={side}]").select_option(axis)
        if axis:
            page.locator(f"#{side}_values").fill(values)
            page.locator(f"#{side}_values").press("Tab")


@both_looks
def test_a_grid_is_drawn_and_watched(visits: Visits, studio: Server, size: str, dark: bool) -> None:
    with visits(size, dark) as visit:
        page = visit.go("/grid")
        visit.check()
        fill(page, "photo of sks person as a knight", "num_inference_steps", "1, 2", "who", "Ada, Chi")
        expect(page.locator(".estimate")).to_contain_text("4 pictures, 2 × 2")
        page.get_by_role("button", name="Draw the grid").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("photo of sks person as a knight")
        expect(page.get_by_role("columnheader")).to_have_text(["1", "2"])
        expect(page.get_by_role("rowheader")).to_have_text(["Ada", "Chi"])
        expect(page.locator(".cell a img")).to_have_count(4)
        expect(page.locator("#sum")).to_contain_text("of 4 pictures")
        expect(page.get_by_role("button", name="Cancel all")).to_have_count(0)
        expect(page.get_by_alt_text("Steps: 2, Who: Chi")).to_be_visible()
        visit.check()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.reload()
        expect(page.locator(".cell a img")).to_have_count(4)
        with page.expect_download() as saved:
            page.get_by_role("link", name="Download as one picture").click()
        with Image.open(io.BytesIO(saved.value.path().read_bytes())) as sheet:
            assert sheet.width > 2 * 512
        page.get_by_alt_text("Steps: 2, Who: Chi").click()
        page.get_by_role("link", name="Part of a grid").click()
        expect(page.get_by_role("rowheader")).to_have_text(["Ada", "Chi"])


def test_a_grid_is_cancelled(visits: Visits, studio: Server) -> None:
    with visits() as visit:
        page = visit.go("/grid")
        fill(page, "photo of sks person in a city", "seed", "1, 2, 3", "", "")
        page.get_by_label("Steps", exact=False).first.fill("150")
        page.get_by_role("button", name="Draw the grid").click()
        page.get_by_role("button", name="Cancel all").click()
        expect(page.get_by_text("Cancelled")).to_have_count(3)


def test_what_does_not_fit_is_told_where_it_is_filled_in(visits: Visits, studio: Server) -> None:
    with visits() as visit:
        page = visit.go("/grid")
        fill(page, "photo of sks person", "who", "<b>Zoe</b>", "seed", "1")
        expect(page.locator(".estimate")).to_contain_text("nobody here is called <b>Zoe</b>")
        page.get_by_role("button", name="Draw the grid").click()
        expect(page.get_by_role("alert")).to_contain_text("nobody here is called <b>Zoe</b>")
        expect(page.locator("#x_values")).to_have_value("<b>Zoe</b>")
        visit.check()
        visit.wrong.clear()  # the browser tells of the status


def test_what_varies_brings_its_values(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/grid")
        page.locator("select[name=x]").select_option("shape")
        expect(page.locator("#x_values")).to_have_value("square, portrait, wide, story")
        page.locator("#x_values").fill("wide")
        page.locator("select[name=x]").select_option("seed")
        expect(page.locator("#x_values")).to_have_value("wide")


def test_without_a_script_a_grid_is_drawn(visits: Visits) -> None:
    with visits(java_script_enabled=False) as visit:
        page = visit.go("/grid")
        fill(page, "photo of sks person in an office", "num_inference_steps", "1, 2", "", "")
        page.get_by_role("button", name="Draw the grid").click()
        expect(page.locator(".cell a img")).to_have_count(2)
