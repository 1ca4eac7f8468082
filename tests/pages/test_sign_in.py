"""The first administrator, and a session that ends while something is drawn."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, bearer
from tests.people import PASSWORD


def test_the_printed_link_leads_to_the_first_picture(visits: Visits, tmp_path: Path) -> None:
    """By the link to an administrator; then the session ends while a job runs, and nothing is lost."""
    with Server(tmp_path, AUTH="required") as server, visits("phone", server=server) as visit:
        page = visit.go("/setup")
        expect(page.get_by_text("Open the whole link")).to_be_visible()
        expect(page.get_by_label("Login")).to_be_hidden()
        visit.check()
        page.goto("about:blank")
        visit.go("/setup#forged")
        fill(visit.page)
        expect(page.get_by_role("alert")).to_contain_text("This link is not good")
        visit.refused(401)
        visit.check()
        page.goto("about:blank")
        [token] = re.findall(r"/setup#(\S+)", server.log)
        visit.go(f"/setup#{token}")
        fill(visit.page)
        expect(page.get_by_text("The administrator is made.")).to_be_visible()
        expect(page.get_by_label("Login")).to_have_value("root")
        assert token not in page.url
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        prompt = "photo of a person in a harbour, drawn while nobody is signed in"
        page.get_by_label("What to draw").fill(prompt)
        page.get_by_role("button", name="Draw").click()
        expect(page.locator(".live", has_text=prompt)).to_be_visible()
        page.get_by_label("What to draw").fill("what comes next")
        end_sessions(server)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Your session is over.")).to_be_visible()
        visit.check()
        page.get_by_label("Login").fill("root")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_label("What to draw")).to_have_value("what comes next")
        expect(page.locator("#lately").get_by_alt_text(prompt)).to_be_visible()
        visit.wrong = [one for one in visit.wrong if "status of 401" not in one]  # of the stream, if it came back


def fill(page: Page) -> None:
    page.get_by_label("Login").fill("root")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Make the administrator").click()


def end_sessions(server: Server) -> None:
    """Sets Root's password once more, which ends every session of theirs."""
    change = {"password": PASSWORD}
    server.client.patch("/admin/users/root", json=change, headers=bearer(server)).raise_for_status()
