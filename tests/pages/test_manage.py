"""Running the place: what happens now and happened, memory, users, usage, the audit, the settings."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import expect

from api.store.database import Database
from api.store.tables import Usage, id_at, now
from tests import rows
from tests.e2e.server import Server
from tests.pages.conftest import Visits, add_user, bearer
from tests.people import PASSWORD

EVIL = "<script>alert(1)</script><b>knight</b>"
SECTIONS = ("", "/requests", "/models", "/users", "/users/ada", "/usage", "/audit", "/settings")


def ask(server: Server, prompt: str, **fields: Any) -> str:
    """Makes a job of Ada's, which waits; returns its id."""
    made = server.client.post("/jobs", json={"prompt": prompt, **fields}, headers=bearer(server, "ada"))
    job_id: str = made.raise_for_status().json()["id"]
    return job_id


def write(server: Server, *made: Any) -> None:
    """Writes rows into the server's database, on another thread: this one has the browser's event loop."""

    async def work() -> None:
        database = Database(f"sqlite:///{server.output.parent / 'data' / 'sitter.db'}")
        async with database.transaction() as session:
            for row in made:
                session.add(row)
                await session.flush()
        await database.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work()).result()


def drawn(days_ago: int, images: int, user_id: str = "ada", model_id: str = "models/sitters/ada") -> list[Any]:
    at = now() - timedelta(days=days_ago)
    done: dict[str, Any] = {"status": "succeeded", "created_at": at, "started_at": at, "finished_at": at}
    request = rows.request(user_id, id=id_at(at) + f"{images:016x}", model_id=model_id, **done)
    used = Usage(
        request_id=request.id, user_id=user_id, images=images, steps=30 * images, work=1, seconds=1.5, created_at=at
    )
    return [request, used]


@pytest.mark.parametrize(("size", "dark"), [("laptop", True), ("phone", False)])
def test_every_section_can_be_read(visits: Visits, house: Server, size: str, dark: bool) -> None:
    with visits(size, dark, house) as visit:
        visit.sign_in("root", "/manage")
        for section in SECTIONS:
            page = visit.go(f"/manage{section}")
            expect(page.locator(".sub [aria-current]")).to_be_in_viewport()
            visit.check()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), section


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_what_waits_is_seen_as_it_comes_and_cancelled(visits: Visits, house: Server, size: str) -> None:
    with visits(size, server=house) as visit:
        page = visit.sign_in("root", "/manage")
        expect(page.get_by_role("heading", name="The queue")).to_be_visible()
        job_id = ask(house, EVIL)
        hidden = ask(house, "a secret wish", sensitive=True)
        row = page.locator(f"#job-{job_id}")
        expect(row).to_contain_text(EVIL)
        expect(page.locator(f"#job-{hidden}")).to_contain_text("kept to themselves")
        assert "a secret wish" not in page.content()
        visit.check()
        for one in (job_id, hidden):
            page.locator(f"#job-{one}").get_by_role("button", name="Cancel").click()
            expect(page.locator(f"#job-{one}")).to_have_count(0)
    assert house.client.get(f"/jobs/{job_id}", headers=bearer(house)).json()["status"] == "cancelled"


def test_without_a_script_a_job_is_cancelled(visits: Visits, house: Server) -> None:
    with visits(server=house, java_script_enabled=False) as visit:
        visit.sign_in("root", "/manage")
        job_id = ask(house, "a castle")
        page = visit.go("/manage")
        page.locator(f"#job-{job_id}").get_by_role("button", name="Cancel").click()
        expect(page.locator(f"#job-{job_id}")).to_have_count(0)


def test_requests_are_found(visits: Visits, house: Server) -> None:
    ask(house, f"a very purple {EVIL}")
    ask(house, "purple and secret", sensitive=True)
    with visits(server=house) as visit:
        page = visit.sign_in("root", "/manage/requests")
        page.get_by_label("Words").fill("purple")
        page.get_by_label("User").fill("ada")
        page.get_by_label("State").select_option("queued")
        page.get_by_role("button", name="Show").click()
        found = page.locator(".requests > li")
        expect(found).to_have_count(1)
        expect(found).to_contain_text(f"a very purple {EVIL}")
        found.locator("summary").click()
        expect(found.get_by_text("pictures: 1")).to_be_visible()
        visit.check()
        found.get_by_role("button", name="Cancel").click()
        page.goto(f"{visit.url}/manage/requests?words=purple&status=queued")
        expect(page.get_by_text("No request is like that.")).to_be_visible()
        page.goto(f"{visit.url}/manage/requests?from=2020-01-01&to=2020-01-02")
        expect(page.get_by_text("No request is like that.")).to_be_visible()


def test_older_requests_are_a_page_away(visits: Visits, house: Server) -> None:
    add_user(house, "mia")
    write(house, *(rows.request("mia", description=f"number {number}", status="cancelled") for number in range(41)))
    with visits("phone", server=house) as visit:
        page = visit.sign_in("root", "/manage/requests?user=mia")
        expect(page.locator(".requests > li")).to_have_count(40)
        page.get_by_role("link", name="Older ones").click()
        expect(page.locator(".requests > li")).to_have_count(1)
        page.go_back()
        expect(page.locator(".requests > li")).to_have_count(40)


def test_a_user_is_added_limited_shut_out_and_let_in(visits: Visits, house: Server) -> None:
    with visits("phone", True, house) as visit:
        page = visit.sign_in("root", "/manage/users")
        page.get_by_text("Add a user").click()
        page.get_by_label("Id:").fill("eve")
        page.get_by_label("Name, if").fill(EVIL)
        page.get_by_label("Password").fill(PASSWORD)
        visit.check()
        page.get_by_role("button", name="Add the user").click()
        expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
        expect(page.get_by_text("They sign in as eve.")).to_be_visible()
        page.get_by_text("Change limits").click()
        page.get_by_label("Pictures in a day").fill("7")
        visit.check()
        page.get_by_role("button", name="Keep these limits").click()
        expect(page.get_by_text("0 of 7")).to_be_visible()
        mine = house.client.get("/me", headers=bearer(house, "eve")).json()
        assert mine["limits"]["images_per_day"]["limit"] == 7
        page.get_by_text("Shut out", exact=True).click()
        page.get_by_role("button", name="Shut them out").click()
        expect(page.get_by_text("shut out", exact=True)).to_be_visible()
        visit.check()
        login = {"login": "eve", "password": PASSWORD}
        assert house.client.post("/auth/login", json=login).status_code == 401
        page.get_by_role("button", name="Let them in again").click()
        page.get_by_label("New password").fill("staple battery horse")
        page.get_by_role("button", name="Set the password").click()
        expect(page.locator("#password").get_by_text("Kept.")).to_be_visible()
        assert house.client.post("/auth/login", json={**login, "password": "staple battery horse"}).status_code == 200
        page.get_by_text("Erase this user").click()
        page.get_by_label("Type eve to confirm").fill("eve")
        page.get_by_role("button", name="Erase everything").click()
        expect(page.get_by_role("link", name="Ada")).to_be_visible()
        expect(page.get_by_text(EVIL)).to_have_count(0)


def test_what_is_wrong_about_a_user_is_told_beside_it(visits: Visits, house: Server) -> None:
    with visits(server=house) as visit:
        page = visit.sign_in("root", "/manage/users")
        page.get_by_text("Add a user").click()
        page.get_by_label("Id:").fill("ada")
        page.get_by_role("button", name="Add the user").click()
        expect(page.get_by_role("alert")).to_contain_text("There is a user ada already.")
        expect(page.get_by_label("Id:")).to_have_value("ada")
        visit.refused(409)
        visit.go("/manage/users/root")
        page.get_by_role("button", name="Make them a plain user").click()
        expect(page.get_by_role("alert")).to_contain_text("Root is the only administrator.")
        visit.refused(409)
        visit.check()


def test_usage_is_drawn_and_can_be_read(visits: Visits, house: Server) -> None:
    add_user(house, "zoe")
    write(house, *drawn(1, 3, "zoe"), *drawn(2, 5, "zoe", "models/demo"), *drawn(60, 9, "zoe"))
    with visits(server=house) as visit:
        page = visit.sign_in("root", "/manage/usage")
        row = page.get_by_role("row", name="zoe")
        expect(row.get_by_role("cell").first).to_have_text("8")
        expect(page.get_by_role("row", name="models/demo").get_by_role("cell").first).to_have_text("5")
        heights = page.locator(".chart rect").evaluate_all("all => all.map(one => Number(one.getAttribute('height')))")
        assert len(heights) == 30
        assert heights[-3] > heights[-2] > 0 == heights[0]
        page.get_by_text("As a table").click()
        expect(page.get_by_role("row", name=(now() - timedelta(days=2)).date().isoformat())).to_contain_text("150")
        visit.check()
        page.get_by_role("link", name="90 days").click()
        expect(row.get_by_role("cell").first).to_have_text("17")
        page.get_by_role("link", name="Steps").click()
        expect(row.get_by_role("cell").first).to_have_text("510")
        page.goto(f"{visit.url}/manage/usage?from=2020-01-01&to=2020-01-07")
        expect(page.get_by_text("Nothing was drawn in these days.")).to_be_visible()
        page.goto(f"{visit.url}/manage/usage?from=2020-01-07&to=2020-01-01")
        expect(page.get_by_text("These days cannot be shown.")).to_be_visible()
        visit.refused(422)


def test_the_audit_is_narrowed_down(visits: Visits, house: Server) -> None:
    with visits("phone", server=house) as visit:
        page = visit.sign_in("root", "/manage/audit")
        page.get_by_label("What begins with").fill("user.created")
        page.get_by_label("Who").fill("setup")
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".audit li")).to_have_count(1)
        expect(page.locator(".audit li")).to_contain_text("user:root")
        page.goto(f"{visit.url}/manage/audit?action=nothing")
        expect(page.get_by_text("No line is like that.")).to_be_visible()


def test_settings_say_where_they_were_read_and_keep_secrets(visits: Visits, house: Server) -> None:
    with visits(server=house) as visit:
        page = visit.sign_in("root", "/manage/settings")
        row = page.locator(".settings li", has=page.get_by_text("AUTH", exact=True))
        expect(row).to_contain_text("required")
        expect(row).to_contain_text("the environment")
        expect(page.locator(".settings li", has_text="LIMIT_QUEUED")).to_contain_text("default")
        assert "hunter2" not in page.content()


def test_memory_is_shown_and_freed(visits: Visits) -> None:
    with visits() as visit:
        page = visit.go("/")
        page.get_by_label("What to draw").fill("photo of a person in a garden")
        page.get_by_label("Steps", exact=False).fill("2")
        page.get_by_role("button", name="Draw").click()
        expect(page.locator(".live").first.get_by_text("Done")).to_be_visible()
        visit.go("/manage/models")
        expect(page.get_by_role("row", name="models/")).not_to_have_count(0)
        visit.check()
        page.get_by_role("button", name="Free what is idle").click()
        expect(page.get_by_text("No model is in memory.")).to_be_visible()
        expect(page.get_by_text("Freed")).to_be_visible()
        visit.check()
