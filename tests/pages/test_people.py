"""From a few pictures to somebody who is drawn: the wizard, the training as it goes on, versions, erasure."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FilePayload, Page, expect

from tests.e2e.server import ROOT, Server
from tests.pages.conftest import Visits, both_looks

EVE = sorted((ROOT / "docs/pictures/eve").glob("*.webp"))
README = ROOT / "README.md"
TRAINED = 120_000  # milliseconds
EVIL = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def small(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose base is tiny: whoever is trained over it looks like noise, within seconds."""
    with Server(tmp_path_factory.mktemp("small"), {"default": str(base_folder)}, LIMIT_TRAININGS="0") as running:
        yield running


def fill(page: Page, name: str, files: Sequence[Path] = EVE[:4], **more: Any) -> None:
    page.set_input_files("#pictures", files)
    page.get_by_label("Name").fill(name)
    page.get_by_label("I am the person in these pictures").check()
    page.get_by_text("More: steps").click()
    for label, value in more.items():
        page.get_by_label(label, exact=True).fill(str(value))


def press(page: Page) -> None:
    page.get_by_role("button", name="Train").click()
    expect(page).to_have_url(re.compile("/people/training/"))


@both_looks
def test_from_pictures_to_somebody_who_is_drawn(visits: Visits, small: Server, size: str, dark: bool) -> None:
    name = f"eve-{size}-{'dark' if dark else 'light'}"
    with visits(size, dark, server=small) as visit:
        page = visit.go("/people")
        visit.check()
        page.get_by_role("link", name="Train somebody").first.click()
        fill(page, name, [*EVE[:4], README], Steps=2)
        expect(page.locator("#chosen .good")).to_have_count(4)
        expect(page.get_by_text("it is no whole JPEG, PNG or WebP")).to_be_visible()
        assert page.locator("#chosen img").first.evaluate("image => image.naturalWidth") > 0
        visit.check()
        page.get_by_role("button", name="Take it away: README.md").click()
        expect(page.get_by_text("4 of 4 are good.")).to_be_visible()
        page.get_by_text("woman", exact=True).click()
        expect(page.get_by_text("sks woman")).to_be_visible()
        press(page)
        expect(page.get_by_text(f"{name.title()} is ready")).to_be_visible(timeout=TRAINED)
        expect(page.locator("#samples img")).to_have_count(4)
        expect(page.get_by_text("4 of 4 pictures are good")).to_be_visible()
        expect(page.locator("#stream")).to_have_count(0)
        visit.check()
        page.get_by_role("link", name="All versions").click()
        expect(page.get_by_text("draws now")).to_be_visible()
        expect(page.get_by_role("img", name="Loss from")).to_be_visible()
        visit.check()
        with page.expect_download() as download:
            page.get_by_role("link", name="For A1111 and ComfyUI").click()
        assert download.value.suggested_filename == f"{name}.safetensors"
        page.get_by_role("link", name="Draw them").click()
        expect(page.locator(f"input[name=who][value='default/{name}']")).to_be_checked()
        expect(page.get_by_text(f"sks woman is {name.title()}")).to_be_visible()
        visit.go("/people")
        expect(page.locator(".person", has_text=name.title()).get_by_text("Version 1")).to_be_visible()
        visit.check()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_is_not_good_enough_says_what_to_do_next(visits: Visits) -> None:
    """The bundled base, which can tell who is who, and far too few steps."""
    with visits() as visit:
        page = visit.go("/people/new")
        fill(page, "eve", EVE, Steps=4)
        page.get_by_label("Learn from other people").uncheck()
        press(page)
        expect(page.locator("#phases [aria-current=step]")).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="Learning Eve")).to_be_visible()
        page.get_by_role("link", name="Create").first.click()
        page.get_by_role("link", name="Eve, training").click()
        expect(page.locator("#samples figure").first).to_be_visible(timeout=3 * TRAINED)
        expect(page.get_by_text("Not good enough yet")).to_be_visible(timeout=3 * TRAINED)
        expect(page.get_by_text("train more steps")).to_be_visible()
        expect(page.locator("#samples img")).to_have_count(4)
        visit.check()
        page.get_by_role("link", name="All versions").click()
        expect(page.get_by_role("button", name="Publish")).to_be_visible()
        page.go_back()
        page.get_by_role("link", name="Train longer, 6 steps").click()
        expect(page.get_by_role("heading", name="Train Eve again")).to_be_visible()
        expect(page.get_by_label("Name")).to_have_value("eve")
        expect(page.get_by_label("Steps", exact=True)).to_have_value("6")


def test_versions_are_published_renamed_and_erased(visits: Visits, small: Server) -> None:
    with visits(server=small) as visit:
        for _ in range(2):
            page = visit.go("/people/new?name=finn&steps=2")
            page.set_input_files("#pictures", EVE[:3])
            page.get_by_label("I am the person in these pictures").check()
            press(page)
            expect(page.get_by_text("Finn is ready")).to_be_visible(timeout=TRAINED)
        page.get_by_role("link", name="All versions").click()
        expect(page.locator("#version-2").get_by_text("draws now")).to_be_visible()
        page.get_by_role("button", name="Roll back to this").click()
        expect(page.locator("#version-1").get_by_text("draws now")).to_be_visible()
        page.get_by_label("Name").fill("finley")
        page.get_by_role("button", name="Rename").click()
        expect(page.get_by_role("heading", name="Finley")).to_be_visible()
        page.get_by_text("Take the consent back").first.click()
        visit.check()
        page.get_by_text("Erase this model").first.click()
        page.locator("#erase-name").fill("finn")
        page.get_by_role("button", name="Erase this model").click()
        expect(page.get_by_text("that is not the name")).to_be_visible()
        assert visit.wrong  # the browser's own line about a 422
        visit.wrong.clear()
        page.locator("#erase-name").fill("finley")
        page.get_by_role("button", name="Erase this model").click()
        expect(page).to_have_url(re.compile("/people$"))
        expect(page.get_by_text("Finley")).to_have_count(0)


def test_pictures_are_dropped_looked_at_and_counted_once(visits: Visits, small: Server) -> None:
    """A file's name is text, and what is alike counts once."""
    drop = """async ([name, address]) => {
        const blob = await (await fetch(address)).blob(), files = new DataTransfer();
        files.items.add(new File([blob], name));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
    }"""
    with visits(server=small) as visit:
        page = visit.go("/people/new")
        page.evaluate(drop, [EVIL, "/static/docs/favicon.svg"])
        expect(page.locator("#chosen .name")).to_have_text(EVIL)
        expect(page.get_by_text("it is no whole JPEG, PNG or WebP")).to_be_visible()
        again: FilePayload = {"name": "again.webp", "mimeType": "image/webp", "buffer": EVE[0].read_bytes()}
        page.set_input_files("#pictures", [EVE[0], EVE[1]])
        expect(page.get_by_text("2 of 3 are good. 1 more, and it can begin.")).to_be_visible()
        page.set_input_files("#pictures", [again])
        expect(page.get_by_text("it is the same as another one")).to_be_visible()
        page.get_by_role("button", name=f"Take it away: {EVE[0].name}").click()
        expect(page.locator("#chosen li", has_text="again.webp").get_by_text("good")).to_be_visible()
        page.get_by_label("Name").fill("few")
        page.get_by_label("I am the person in these pictures").check()
        page.get_by_role("button", name="Train").dblclick()
        expect(page.locator(".notice")).to_contain_text("3 are the least")
        expect(page.locator(".notice")).to_contain_text(EVIL)
        assert page.evaluate("document.getElementById('pictures').files.length") == 3  # nothing is lost
        visit.wrong.clear()  # the browser's own lines about a 422


def test_a_training_is_stopped(visits: Visits, small: Server) -> None:
    with visits(server=small) as visit:
        page = visit.go("/people/new")
        fill(page, "gil", Steps=4000)
        page.get_by_role("button", name="Train").dblclick()
        expect(page).to_have_url(re.compile("/people/training/"))
        expect(page.get_by_role("img", name="Loss from")).to_be_visible(timeout=TRAINED)
        assert sum(job["model_id"] == "default/gil" for job in small.get("/jobs")["jobs"]) == 1
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_text("Cancelled")).to_be_visible()
        page.get_by_role("link", name="Begin again").click()
        expect(page.get_by_label("Name")).to_have_value("gil")


def test_it_goes_on_when_the_server_was_away(visits: Visits, base_folder: Path, tmp_path: Path) -> None:
    with Server(tmp_path, {"default": str(base_folder)}) as server, visits(server=server) as visit:
        page = visit.go("/people/new")
        fill(page, "hal", Steps=120)
        press(page)
        expect(page.get_by_role("img", name="Loss from")).to_be_visible(timeout=TRAINED)
        server.stop()
        server.start()
        expect(page.get_by_text("Hal is ready")).to_be_visible(timeout=TRAINED)
        visit.wrong.clear()  # the browser's own lines about a server that is away


def test_without_a_script(visits: Visits, small: Server) -> None:
    with visits(server=small, java_script_enabled=False) as visit:
        page = visit.go("/people/new?steps=2")
        page.set_input_files("#pictures", EVE[:3])
        page.get_by_label("Name").fill("ida")
        page.get_by_label("I am the person in these pictures").check()
        press(page)
        expect(page.get_by_text("Ida is ready")).to_be_visible(timeout=TRAINED)
        page.get_by_role("link", name="Try it").click()
        expect(page.locator("input[name=who][value='default/ida']")).to_be_checked()
