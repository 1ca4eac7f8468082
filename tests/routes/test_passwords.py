"""What is no text is no password, wherever one is sent."""

import json
from typing import Any

import pytest

from api.store.database import Database
from tests import people
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

HALF = PASSWORD + "\ud800"


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "/auth/login", {"login": "root", "password": "\ud800"}, "password"),
        ("PATCH", "/me/password", {"current_password": HALF, "new_password": PASSWORD}, "current_password"),
        ("PATCH", "/me/password", {"current_password": PASSWORD, "new_password": HALF}, "new_password"),
        ("POST", "/admin/users", {"id": "bo", "password": HALF}, "password"),
        ("PATCH", "/admin/users/root", {"password": HALF}, "password"),
        ("POST", "/setup", {"token": "x", "user_id": "bo", "password": HALF}, "password"),
    ],
)
async def test_half_a_character_is_refused(
    database: Database, method: str, path: str, body: dict[str, Any], field: str
) -> None:
    await people.add_user(database, "root", PASSWORD, type="admin")
    app = people.app_over(people.accounts_over(database))
    async with people.client_of(app, await people.add_key(database, "root")) as client:
        answer = await client.request(
            method, path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")
    assert answer.json()["detail"].startswith(f"{field}: it has half a character")
    assert PASSWORD not in answer.text
