"""One's account: limits, keys, sessions, the password, one's data, language and light."""

import re

from playwright.sync_api import expect

from tests.e2e.server import Server
from tests.pages.conftest import Visits, add_user, both_looks
from tests.people import PASSWORD

EVIL = '<img src=x onerror="alert(1)"> laptop'


def status_with(server: Server, key: str) -> int:
    return server.client.get("/me", headers={"Authorization": f"Bearer {key}"}).status_code


@both_looks
def test_a_key_is_made_shown_once_and_revoked(visits: Visits, house: Server, size: str, dark: bool) -> None:
    with visits(size, dark, house) as visit:
        page = visit.sign_in("ada", "/account")
        expect(page.get_by_text("Pictures today")).to_be_visible()
        visit.check()
        page.get_by_text("Make a key").click()
        page.get_by_label("What it is for").fill(EVIL)
        visit.check()
        page.get_by_role("button", name="Make the key").click()
        secret = page.get_by_label("it is shown this once")
        expect(secret).to_have_value(re.compile(r"^sk_\S{40,}$"))
        key = secret.input_value()
        assert status_with(house, key) == 200
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        row = page.locator("#keys li", has_text=EVIL)
        expect(row).to_have_count(1)
        visit.check()
        page.reload()
        expect(page.locator("#keys li", has_text=EVIL)).to_be_visible()
        assert key not in page.content()
        page.get_by_label(f"Revoke {EVIL}").click()
        page.get_by_role("button", name="Revoke it").click()
        expect(page.locator("#keys li", has_text=EVIL)).to_have_count(0)
        assert status_with(house, key) == 401
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_key_that_allows_nothing_is_refused_kindly(visits: Visits, house: Server) -> None:
    with visits(server=house) as visit:
        page = visit.sign_in("ada", "/account")
        page.get_by_text("Make a key").click()
        page.get_by_label("What it is for").fill("nothing")
        for scope in ("draw:", "read:"):
            page.get_by_label(scope).uncheck()
        page.get_by_role("button", name="Make the key").click()
        expect(page.get_by_role("alert")).to_contain_text("Nothing was changed.")
        visit.refused(422)


def test_without_a_script_a_key_is_made(visits: Visits, house: Server) -> None:
    with visits(server=house, java_script_enabled=False) as visit:
        page = visit.sign_in("bo", "/account")
        page.get_by_text("Make a key").click()
        page.get_by_label("What it is for").fill("old browser")
        page.get_by_role("button", name="Make the key").click()
        assert status_with(house, page.get_by_label("it is shown this once").input_value()) == 200
        page.get_by_text("Dark", exact=True).click()
        page.get_by_role("button", name="Keep this").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_language_and_light(visits: Visits, house: Server) -> None:
    with visits(server=house) as visit:
        page = visit.sign_in("bo", "/account")
        page.get_by_text("Dark", exact=True).click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.get_by_text("Français", exact=True).click()
        expect(page.locator("html")).to_have_attribute("lang", "fr")
        page.get_by_text("English", exact=True).click()
        expect(page.locator("html")).to_have_attribute("lang", "en")


def test_the_password_is_changed(visits: Visits, house: Server) -> None:
    add_user(house, "pia")
    new = "a new one, longer"
    with visits(server=house) as visit:
        page = visit.sign_in("pia", "/account")

        def change(current: str, again: str = new) -> None:
            page.get_by_label("Password until now").fill(current)
            page.get_by_label("New password").fill(new)
            page.get_by_label("Once more").fill(again)
            page.get_by_role("button", name="Change the password").click()

        change("wrong")
        expect(page.get_by_role("alert")).to_contain_text("The current password is wrong.")
        visit.refused(401)
        change(PASSWORD, "something else entirely")
        expect(page.get_by_role("alert")).to_contain_text("differ")
        visit.refused(422)
        visit.check()
        change(PASSWORD)
        expect(page.get_by_text("The password is changed.")).to_be_visible()
        visit.check()
        visit.sign_in("pia", "/account", new)
        expect(page.get_by_role("heading", name="Pia")).to_be_visible()


def test_signing_out_here_and_everywhere(visits: Visits, house: Server) -> None:
    add_user(house, "sam")
    with visits(server=house) as first, visits("phone", server=house) as second:
        for visit in (first, second):
            visit.sign_in("sam", "/account")
        first.page.locator(".menu summary").click()
        first.page.locator(".menu").get_by_role("button", name="Sign out").click()
        expect(first.page.get_by_text("You are signed out.")).to_be_visible()
        expect(second.go("/account").get_by_role("heading", name="Sam")).to_be_visible()
        first.sign_in("sam", "/account").get_by_role("button", name="Sign out everywhere").click()
        expect(first.page.get_by_text("You are signed out everywhere.")).to_be_visible()
        expect(second.go("/account").get_by_text("Your session is over.")).to_be_visible()
        second.check()


def test_data_is_taken_along_and_erased(visits: Visits, house: Server) -> None:
    add_user(house, "kim")
    with visits("phone", server=house) as visit:
        page = visit.sign_in("kim", "/account")
        with page.expect_download() as download:
            page.get_by_role("link", name="Export my data").click()
        assert download.value.suggested_filename == "sitter-kim.zip"
        page.get_by_text("Erase my account").click()
        visit.check()
        button = page.get_by_role("button", name="Erase everything")
        page.get_by_label("Type kim to confirm").fill("Kim")
        expect(button).to_be_disabled()
        page.get_by_label("Type kim to confirm").fill("kim")
        button.click()
        expect(page.get_by_text("The account is erased")).to_be_visible()
        visit.sign_in("kim", "/account")
        expect(page.get_by_role("alert")).to_contain_text("The login or the password is wrong.")
        visit.refused(401)
        visit.check()


def test_where_nobody_signs_in(visits: Visits) -> None:
    with visits("phone", dark=True) as visit:
        page = visit.go("/account")
        expect(page.get_by_text("Nobody signs in here")).to_be_visible()
        expect(page.get_by_text("Waiting at once")).to_be_visible()
        expect(page.get_by_text("API keys")).to_have_count(0)
        visit.check()
        page.get_by_text("Light", exact=True).click()
        expect(page.locator("html")).to_have_attribute("data-theme", "light")
