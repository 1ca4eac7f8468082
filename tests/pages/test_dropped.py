"""A PNG that says how it was made fills in the form, wherever it is dropped."""

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from api.domain.png_text import with_text
from tests.e2e.server import Server
from tests.pages.conftest import Visits
from tests.pages.test_picture import draw

THEIRS = (
    "a <b>knight</b>, oil\nNegative prompt: fog\nSteps: 12, Sampler: Euler a, CFG scale: 4.5, Seed: 77, Size: 512x900"
)
TRANSFER = """([name, type, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))], name, { type }));
  return transfer;
}"""


def png(says: str | None) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    return with_text(buffer.getvalue(), {"parameters": says} if says else {})


def drop(page: Page, data: bytes, on: str = "main") -> None:
    transfer = page.evaluate_handle(TRANSFER, ["a.png", "image/png", base64.b64encode(data).decode()])
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(on, event, {"dataTransfer": transfer})


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_a_png_of_another_program_is_dropped(visits: Visits, studio: Server, size: str) -> None:
    image = draw(studio, "photo of sks person, under a dropped one")
    with visits(size) as visit:
        page = visit.go(f"/picture/{image}")
        drop(page, png(THEIRS))
        expect(page).to_have_url(f"{visit.url}/")
        expect(page.get_by_label("What to draw")).to_have_value("a <b>knight</b>, oil")
        expect(page.get_by_label("Seed", exact=True)).to_have_value("77")
        expect(page.get_by_label("Guidance")).to_have_value("4.5")
        expect(page.get_by_label("Sampler")).to_have_value("euler_a")
        expect(page.get_by_label("Keep out")).to_have_value("fog")
        expect(page.get_by_label("Story")).to_be_checked()
        visit.check()
        page.get_by_label("Steps", exact=False).first.fill("1")
        page.get_by_role("button", name="Draw").click()
        card = page.locator(".live").first
        expect(card.locator("h2")).to_have_text("a <b>knight</b>, oil")
        expect(card.get_by_text("Done")).to_be_visible()


def test_our_own_png_is_chosen_with_the_keyboard(visits: Visits, studio: Server) -> None:
    image = draw(studio, "photo of sks person, chosen", seed=5)
    file = studio.client.get(f"/images/{image}/file").content
    with visits() as visit:
        page = visit.go("/")
        page.get_by_text("More:").click()
        page.get_by_label("As another picture was made").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": file}
        )
        expect(page.get_by_label("What to draw")).to_have_value("photo of sks person, chosen")
        expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
        expect(page.get_by_label("Ada", exact=True)).to_be_checked()
        page.reload()
        expect(page.get_by_label("What to draw")).to_have_value("photo of sks person, chosen")


def test_a_file_that_says_nothing_leaves_the_page_as_it_is(visits: Visits, studio: Server) -> None:
    image = draw(studio, "photo of sks person, undisturbed")
    with visits() as visit:
        page = visit.go(f"/picture/{image}")
        for data, told in (
            (png(None), "does not say how it was made"),
            (b"GIF89a", "no PNG"),
            (png(THEIRS) + b"x" * 20_200_000, "over"),
        ):
            drop(page, data)
            expect(page.locator("#notice")).to_contain_text(told)
            expect(page).to_have_url(f"{visit.url}/picture/{image}")
        assert all("Failed to load resource" in one for one in visit.wrong), visit.wrong
        visit.wrong.clear()


def test_without_a_script_a_png_is_read(visits: Visits, studio: Server) -> None:
    with visits(java_script_enabled=False) as visit:
        page = visit.go("/")
        page.get_by_text("More:").click()
        field = page.get_by_label("As another picture was made")
        field.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(THEIRS)})
        page.get_by_role("button", name="Read it").click()
        expect(page.get_by_label("What to draw")).to_have_value("a <b>knight</b>, oil")
