"""The gallery: scroll, find, rate, file, take along, delete and undo; by mouse, by keys and on the phone."""

import asyncio
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image as Picture
from playwright.sync_api import Locator, Page, expect
from sqlalchemy import delete

from api.domain.library import searchable
from api.routes.pages.gallery import SHEET
from api.store.database import Database
from api.store.files import PictureFolder, blur
from api.store.tables import ImageTag, Request, User
from tests import rows
from tests.e2e.server import Server
from tests.pages.conftest import Visits, both_looks

COUNT = SHEET + 30
EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def wall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, for tests that hang pictures and take them down."""
    with Server(tmp_path_factory.mktemp("wall"), WORKERS="0") as running:
        yield running


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", (64, 64), (number * 37 % 256, number * 91 % 256, 120)).save(buffer, "PNG")
    return buffer.getvalue()


async def _hang(server: Server, prompts: list[str]) -> None:
    folder, database = (
        PictureFolder(server.output),
        Database(f"sqlite:///{server.output.parent / 'data' / 'sitter.db'}"),
    )
    async with database.transaction() as session:
        await session.execute(delete(Request))  # and, by cascade, its pictures
        if not await session.get(User, "default"):
            session.add(rows.user("default"))
            await session.flush()
        for number, prompt in enumerate(prompts):
            job = rows.request("default", status="succeeded", description=prompt, parameters={"guidance_scale": 7.5})
            name = f"default_20260101_000000_{job.id[-12:]}.png"
            folder.save(name, png(number))
            image = rows.image(
                job, id=f"{number + 1:028x}", image_url=name, words=searchable(prompt), blur=blur(png(number))
            )
            for group in ([job], [image], [ImageTag(image_id=image.id, tag="even")] if number % 2 == 0 else []):
                session.add_all(group)
                await session.flush()
    await database.close()


def hang(server: Server, prompts: list[str]) -> None:
    """Takes all pictures down and hangs these; the last one is the newest."""
    with ThreadPoolExecutor(1) as apart:  # the browser's driver has this thread's loop
        apart.submit(asyncio.run, _hang(server, prompts)).result()


def numbered(count: int = COUNT) -> list[str]:
    return [f"a knight, number {number}" for number in range(count)]


def tile(page: Page, number: int) -> Locator:
    return page.locator(f"#p-{number + 1:028x}")


def focused(page: Page, number: int) -> None:
    expect(tile(page, number).locator("a")).to_be_focused()


@both_looks
def test_scrolling_and_finding(visits: Visits, wall: Server, size: str, dark: bool) -> None:
    hang(wall, [*numbered(), EVIL])
    with visits(size, dark, server=wall) as visit:
        page = visit.go("/gallery")
        expect(page.locator(".tile")).to_have_count(SHEET)
        expect(page.locator(".tile").first.locator("figcaption")).to_have_text(EVIL)
        expect(page.locator(".tile .blur").first).to_have_attribute("src", re.compile("^data:image/webp"))
        visit.check()
        page.mouse.wheel(0, 20_000)
        expect(page.locator(".tile")).to_have_count(COUNT + 1)
        expect(page.locator(".older")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_label("Words of the prompt").fill("number 17")
        expect(page.locator(".tile")).to_have_count(1)
        assert page.url.endswith("/gallery?words=number+17")
        page.get_by_text("even 46").click()
        expect(page.get_by_text("No picture is like that.")).to_be_visible()
        visit.check()
        page.go_back()
        expect(page.locator(".tile")).to_have_count(1)
        expect(page.get_by_label("Words of the prompt")).to_have_value("number 17")
        page.go_back()
        expect(page.locator(".tile")).to_have_count(SHEET)
        page.goto(f"{visit.url}/gallery?words=number+17&tag=even")
        page.get_by_role("link", name="the words “number 17”").click()
        expect(page.locator(".tile")).to_have_count(46)


def test_keys_move_select_rate_and_delete(visits: Visits, wall: Server) -> None:
    hang(wall, numbered())
    top = COUNT - 1
    with visits(server=wall) as visit:
        page = visit.go("/gallery")
        page.keyboard.press("ArrowRight")
        focused(page, top)
        page.keyboard.press("ArrowRight")
        focused(page, top - 1)
        page.keyboard.press("ArrowDown")
        focused(page, top - 6)
        expect(page.locator("#details h2")).to_have_text(f"a knight, number {top - 6}")
        page.keyboard.press("3")
        expect(tile(page, top - 6)).to_have_attribute("data-rating", "3")
        expect(page.get_by_role("button", name="3 of 5 stars", pressed=True)).to_be_visible()
        page.keyboard.press("Space")
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowRight")
        expect(page.locator("[data-count]")).to_have_text("3")
        page.keyboard.press("5")
        for number in (top - 6, top - 7, top - 8):
            expect(tile(page, number)).to_have_attribute("data-rating", "5")
        page.keyboard.press("Escape")
        expect(page.locator(".bar")).to_be_hidden()
        page.keyboard.press("?")
        expect(page.get_by_role("heading", name="Keys")).to_be_visible()
        visit.check()
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        expect(page.get_by_label("Words of the prompt")).to_be_focused()
        tile(page, top - 8).locator("a").focus()
        page.keyboard.press("Control+a")
        expect(page.locator("[data-count]")).to_have_text(str(SHEET))
        page.keyboard.press("Escape")
        page.keyboard.press("Delete")
        expect(tile(page, top - 8)).to_be_hidden()
        focused(page, top - 9)
        page.keyboard.press("Control+z")
        expect(tile(page, top - 8)).to_be_visible()
        focused(page, top - 8)
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/picture/{top - 7:028x}")
        page.go_back()
        focused(page, top - 8)
        visit.wrong.clear()  # the page of a picture is another test's


def test_deleting_can_be_undone_and_is_done_when_the_page_goes(visits: Visits, wall: Server) -> None:
    hang(wall, numbered(8))
    with visits(server=wall) as visit:
        page = visit.go("/gallery")
        page.get_by_label("Select: a knight, number 7").check(force=True)
        tile(page, 4).locator("input").click(modifiers=["Shift"], force=True)
        expect(page.locator("[data-count]")).to_have_text("4")
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(page.get_by_text("4 pictures deleted.")).to_be_visible()
        expect(page.locator(".tile:visible")).to_have_count(4)
        visit.check()
        page.get_by_role("button", name="Undo").click()
        expect(page.locator(".tile:visible")).to_have_count(8)
        assert len(wall.get("/images")["images"]) == 8
        tile(page, 7).locator("a").focus()
        with page.expect_response("**/page/gallery/delete") as done:  # once nobody has undone it
            page.keyboard.press("Delete")
            expect(page.get_by_text("1 picture deleted.")).to_be_visible()
        assert done.value.status == 204
        expect(page.get_by_text("1 picture deleted.")).to_have_count(0)
        assert len(wall.get("/images")["images"]) == 7
        tile(page, 6).locator("a").focus()
        page.keyboard.press("Delete")
        page.reload()
        expect(page.locator(".tile:visible")).to_have_count(6)
        expect(tile(page, 6)).to_have_count(0)
    assert len(wall.get("/images")["images"]) == 6


def test_rows_stay_whole_when_pictures_go(visits: Visits, wall: Server) -> None:
    hang(wall, numbered())
    with visits(server=wall) as visit:
        page = visit.go("/gallery")
        page.mouse.wheel(0, 20_000)
        expect(page.locator(".tile")).to_have_count(COUNT)
        tile(page, COUNT - 3).locator("a").focus()
        page.keyboard.press("Delete")
        sheets = page.locator(".sheet")
        expect(sheets.first.locator(".tile:visible")).to_have_count(SHEET)
        page.keyboard.press("Control+z")
        expect(sheets.first.locator(".tile")).to_have_count(SHEET)
        shown = page.evaluate("[...document.querySelectorAll('.tile')].map((one) => one.id)")
        assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_boards_and_taking_along(visits: Visits, wall: Server, size: str, tmp_path: Path) -> None:
    hang(wall, numbered(8))
    phone = size == "phone"
    with visits(size, server=wall, has_touch=phone, is_mobile=phone) as visit:
        page = visit.go("/gallery")
        if phone:
            page.get_by_role("button", name="Select", exact=True).tap()
            tile(page, 7).tap()
            tile(page, 5).tap()
        else:
            for number in (7, 5):
                tile(page, number).hover()
                tile(page, number).locator("input").check()
        expect(page.locator("[data-count]")).to_have_text("2")
        visit.check()
        page.locator(".bar input[name=board]").fill("for the wall")
        page.locator(".bar").get_by_role("button", name="Put there").click()
        expect(page.get_by_text("for the wall 2")).to_be_visible()
        with page.expect_download() as loading:
            page.get_by_role("button", name="ZIP").click()
        loading.value.save_as(tmp_path / "pictures.zip")
        with ZipFile(tmp_path / "pictures.zip") as archive:
            assert [archive.read(name) for name in archive.namelist()] == [png(5), png(7)]
        page.get_by_text("for the wall 2").click()
        expect(page.locator(".tile")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_details_file_and_rate(visits: Visits, wall: Server) -> None:
    hang(wall, numbered(8))
    with visits(server=wall) as visit:
        page = visit.go("/gallery")
        tile(page, 5).locator("a").click()
        details = page.get_by_label("About the picture")
        expect(details.get_by_role("heading")).to_have_text("a knight, number 5")
        details.get_by_role("button", name="4 of 5 stars").click()
        expect(details.get_by_role("button", name="4 of 5 stars", pressed=True)).to_be_visible()
        expect(tile(page, 5)).to_have_attribute("data-rating", "4")
        details.get_by_label("Board", exact=True).fill(EVIL[:60])
        page.keyboard.press("Enter")
        expect(details.get_by_role("link", name=EVIL[:60])).to_be_visible()
        visit.check()
        details.get_by_role("button", name=f"Take it off the board {EVIL[:60]}").click()
        expect(details.get_by_role("link", name=EVIL[:60])).to_have_count(0)
        expect(details.get_by_role("link", name="Remix")).to_have_attribute("href", f"/?image={6:028x}")
        found = wall.get(f"/images/{6:028x}")
        assert (found["rating"], found["tags"]) == (4, [])


def test_without_a_script(visits: Visits, wall: Server) -> None:
    hang(wall, numbered())
    with visits(server=wall, java_script_enabled=False) as visit:
        page = visit.go("/gallery")
        page.get_by_label("Select: a knight, number 88").check()
        page.get_by_role("button", name="3 of 5 stars").click()
        expect(page.locator(".tile").nth(1)).to_have_attribute("data-rating", "3")
        page.get_by_role("link", name="Older pictures").click()
        expect(page.locator(".tile")).to_have_count(COUNT - SHEET)
        page.get_by_role("link", name="To the newest").click()
        page.get_by_label("Words of the prompt").fill("number 17")
        page.get_by_role("button", name="Find").click()
        page.get_by_label("Select: a knight, number 17").check()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(page.get_by_role("heading", name="Delete what you selected?")).to_be_visible()
        page.get_by_role("button", name="Delete").click()
        expect(page.locator(".tile")).to_have_count(SHEET)


def test_an_empty_gallery_teaches(visits: Visits, wall: Server) -> None:
    hang(wall, [])
    with visits("phone", server=wall) as visit:
        page = visit.go("/gallery")
        expect(page.get_by_role("heading", name="Your pictures will be kept here.")).to_be_visible()
        visit.check()
        page.get_by_role("link", name="Draw the first one").click()
        expect(page.get_by_label("What to draw")).to_be_visible()


def test_a_server_that_is_gone_is_told(visits: Visits, wall: Server) -> None:
    hang(wall, numbered(8))
    with visits(server=wall) as visit:
        page = visit.go("/gallery")
        tile(page, 5).locator("a").focus()
        page.context.set_offline(True)
        page.keyboard.press("4")
        expect(page.get_by_text("nothing was changed")).to_be_visible()
        expect(tile(page, 5)).to_have_attribute("data-rating", "0")
        page.context.set_offline(False)
        visit.wrong.clear()  # the browser says so, too
