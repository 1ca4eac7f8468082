"""A control character in every text that the OpenAPI document takes; PostgreSQL cannot keep a NUL, nor compare it."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI

from api.store.database import Database
from tests import people
from tests.people import PASSWORD

pytestmark = pytest.mark.anyio

SCHEMAS = "#/components/schemas/"
NUL = "a\x00b"
NOT_KEPT = {"prefer", "range", "if-range", "if-none-match", "tus-resumable"}
NOT_KEPT |= {"password", "current_password", "new_password"}
"""What no database is asked for: it may be taken as it is, though it must not break anything."""
GOOD = {"prompt": "a knight", "login": "ada", "name": "Ada", "token": "x", "user_id": "ada", "id": "chi"}
GOOD |= {"password": PASSWORD, "current_password": PASSWORD, "new_password": PASSWORD}
Text = tuple[str, str, str, str, Any]
"""Method, path, `query`, `header`, `path` or `body`, name, and a value with a control character."""


def texts(document: dict[str, Any]) -> Iterator[Text]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                if (value := spoilt(parameter["schema"])) is not None:
                    yield method, path, parameter["in"], parameter["name"], value
            for name, schema in fields(document, operation).items():
                if (value := spoilt(schema)) is not None:
                    yield method, path, "body", name, value


def fields(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any]:
    """The fields of the body, with their schemas."""
    body = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})
    schema = body["content"].get("application/json", {"schema": {}})["schema"]  # of forms there are tests of their own
    names = [one["$ref"].removeprefix(SCHEMAS) for one in (schema, *schema.get("anyOf", ())) if "$ref" in one]
    return {
        field: about for name in names for field, about in document["components"]["schemas"][name]["properties"].items()
    }


def spoilt(schema: dict[str, Any]) -> str | list[str] | None:
    """A text, or a list of one, with a control character; None where the schema takes no free text."""
    for one in (schema, *schema.get("anyOf", ())):
        if one.get("type") == "string" and "enum" not in one:
            return NUL
        if one.get("type") == "array" and spoilt(one["items"]):
            return [NUL]
    return None


async def test_no_control_character_reaches_the_database(app: FastAPI, database: Database) -> None:
    await people.add_user(database, "root", PASSWORD, type="admin")
    wrong, tried = [], set()
    async with people.client_of(app, await people.add_key(database, "root")) as client:
        for method, path, where, name, value in texts(document := app.openapi()):
            body = {field: GOOD[field] for field in fields(document, document["paths"][path][method]) if field in GOOD}
            body |= {name: value} if where == "body" else {}
            url = path.replace("{user_id}", quote(NUL) if where == "path" else "ada")
            url = (
                url.replace("{", "").replace("}", "")
                if where != "path"
                else url.format_map(defaultdict(lambda: "1", {name: quote(NUL)}))
            )
            answer = await client.request(
                method,
                url,
                params={name: value} if where == "query" else None,
                headers={"Prefer": "respond-async"} | ({name: value} if where == "header" else {}),
                json=body or None,
            )
            tried.add(name)
            expected = answer.status_code < 500 if name in NOT_KEPT else answer.status_code == 422
            if not expected:
                wrong.append(f"{method} {path} answers {answer.status_code} to a NUL in {name} ({where})")
    assert not wrong, "\n".join(wrong)
    assert tried >= {"words", "model", "tag", "before", "idempotency-key", "tags", "webhook_url", "job_id", "after"}
