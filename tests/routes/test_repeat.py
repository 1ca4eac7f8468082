import httpx2
import pytest

from api.main import create_app
from api.store.database import Database
from tests import builders, people
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

SAME = {"Idempotency-Key": "mine"}
# What these do twice is what they do once; signing in again gives a new token, an upload begun in vain expires.
HARMLESS = {"/auth/login", "/auth/logout", "/setup", "/jobs/{job_id}/cancel"}
HARMLESS |= {"/models", "/models/{model_id}/versions/{number}/publish", "/uploads"}


def test_every_post_that_makes_something_may_be_repeated() -> None:
    paths = create_app(builders.settings()).openapi()["paths"]
    posts = {path: item["post"].get("parameters", []) for path, item in paths.items() if "post" in item}
    repeatable = {path for path, parameters in posts.items() if "idempotency-key" in [p["name"] for p in parameters]}
    assert repeatable == posts.keys() - HARMLESS


async def test_a_user_and_a_key_are_made_once(database: Database) -> None:
    await people.add_user(database, "root", type="admin")
    app = people.app_over(people.accounts_over(database))
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        new = {"id": "ada", "password": PASSWORD}
        users = [await root.post("/admin/users", json=new, headers=SAME) for _ in range(2)]
        assert [answer.status_code for answer in users] == [201, 201]
        assert users[0].json() == users[1].json()
        assert (await root.post("/admin/users", json=new)).status_code == 409
        other = await root.post("/admin/users", json={"id": "bo"}, headers=SAME)
        assert (other.status_code, other.json()["error"]) == (422, "idempotency_key_reused")
        again = {"Idempotency-Key": "another"}
        keys = [await root.post("/me/keys", json={"name": "laptop"}, headers=again) for _ in range(2)]
        assert keys[0].json() == keys[1].json()
        assert len((await root.get("/me/keys")).json()["keys"]) == 2
    async with people.client_of(app, keys[1].json()["key"]) as program:
        assert (await program.get("/me")).json()["user_id"] == "root"
    made = [line for line in await people.audited(database) if line[1:] == ("user.created", "user:ada")]
    assert len(made) == 1


async def test_the_same_key_at_another_door_is_another_request(database: Database) -> None:
    await people.add_user(database, "root", type="admin")
    app = people.app_over(people.accounts_over(database))
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        assert (await root.post("/me/keys", json={"name": "x"}, headers=SAME)).status_code == 201
        refused: httpx2.Response = await root.post("/admin/users", json={"id": "x"}, headers=SAME)
        assert refused.status_code == 422
