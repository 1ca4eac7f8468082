"""The form of POST /trainings: its fields, its encoding and its size, and how long it may take to come."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from api.routes import limits
from api.store.database import Database
from api.wire.models import MOST_RANK, MOST_STEPS, TrainingRequest
from tests.forms import BOUNDARY, FORM, GOOD, MULTIPART, form_of, left, pictures, wrong_answer

pytestmark = pytest.mark.anyio

LONG = "x" * 65
CONTROLS = ["\0", "\x01", "\n", "\r", "\x1b", "\x7f"]
FIELDS: list[tuple[str, str | None]] = [
    *(("name", value) for value in (None, "", "-ada", ".ada", "../ada", "a/b", "a b", "ada\n", "Åda", LONG)),
    *(("consent", value) for value in (None, "false", "0", "no", "", "perhaps")),
    *(("class_noun", value) for value in ("", "x", "Person", "person ", " person", "person.", "sks-person", LONG)),
    *(("steps", value) for value in ("0", "-1", str(MOST_STEPS + 1), "1.5", "ten", "1e3", "9" * 5000, "NaN")),
    *(("kind", value) for value in ("", "Full", "full ", "checkpoint", "1")),
    *(("rank", value) for value in ("0", "-1", str(MOST_RANK + 1), "1.5", "ten")),
    *(("seed", value) for value in ("-1", str(2**32), "1.5", "x")),
    *(("flip", value) for value in ("2", "perhaps")),
    *(("keep_pictures", value) for value in ("2", "perhaps")),
    *(("user_id", value) for value in ("", "../ada", LONG)),
    *(("webhook_url", value) for value in ("", "ftp://example.com/", "http://127.0.0.1/", "x" * 2001)),
    ("base", "x" * 501),
    ("pictures", "text"),
    ("archive", "text"),
    ("nobody_knows_this", "1"),
    ("__class__", "1"),
    ("photos", "1"),
]
# What each field may say; a number or a word of yes and no may have white space around it, which is not kept.
TEXTS = {
    "name": "ada",
    "class_noun": "person",
    "user_id": "ada",
    "base": "models/demo",
    "webhook_url": "https://example.com/",
}
NAMES = [
    b"\0.png",
    b"\x1b[31m.png",
    b"\x7f.png",
    b"a\tb.png",
    b"..\\..\\a.png",
    b"/etc/passwd",
    b"\xff\xfe.png",
    b"x" * 5000,
]
NAMES += ["\u202egnp.exe".encode(), "\x85.png".encode(), "\ufeff\u2028".encode(), b""]


async def post(
    client: httpx2.AsyncClient, body: bytes | AsyncIterator[bytes], kind: str = MULTIPART, **headers: str
) -> httpx2.Response:
    return await client.post("/trainings", content=body, headers={"Content-Type": kind, **headers})


def encoded(fields: dict[str, str]) -> dict[str, bytes]:
    return {name: value.encode() for name, value in fields.items()}


async def test_fields_out_of_bounds_are_refused(ada: httpx2.AsyncClient, database: Database, data_dir: Path) -> None:
    wrong = dict[str, str]()
    for field, value in FIELDS:
        data = {name: text for name, text in {**FORM, field: value}.items() if text is not None}
        answer = await ada.post("/trainings", data=data, files=pictures(*GOOD))
        wrong |= {f"{field}={value!r:.40}": found for found in [wrong_answer(answer, 422, field)] if found}
    assert not wrong
    assert await left(database, data_dir) == []


async def test_fields_at_their_bounds_are_accepted(ada: httpx2.AsyncClient) -> None:
    for least, most in (("steps", MOST_STEPS), ("rank", MOST_RANK), ("seed", 2**32 - 1)):
        answer = await ada.post("/trainings", data={**FORM, least: str(most)}, files=pictures(*GOOD))
        assert answer.status_code == 202, answer.text


async def test_no_control_character_gets_into_a_field(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    wrong = dict[str, str]()
    for field, about in TrainingRequest.model_fields.items():
        value = TEXTS.get(field, "true" if about.annotation is bool else "100")
        spoilt = [value[:at] + control + value[at:] for control in CONTROLS for at in (0, 1, len(value))]
        for sent in spoilt if field in TEXTS else [text for text in spoilt if text.strip() != value]:
            answer = await post(ada, form_of(encoded({**FORM, field: sent}), []))
            wrong |= {f"{field}={sent!r}": found for found in [wrong_answer(answer, 422, field)] if found}
    assert not wrong
    assert await left(database, data_dir) == []


async def test_a_file_may_be_called_anything(ada: httpx2.AsyncClient) -> None:
    """What people could not read is not in the answer, nor in the database."""
    named = []
    for name in NAMES:
        files = [(name, content) for _, content in GOOD]
        answer = await post(ada, form_of(encoded(FORM), files))
        if wrong_answer(answer, 400, "Invalid multipart data") is not None:  # it is no header of a form
            assert answer.status_code == 202, (name, answer.text)
            named += [name]
            there = answer.headers["Location"]
            told = {one["name"] for one in (await ada.get(there)).json()["training"]["pictures"]}
            await ada.post(f"{there}/cancel")  # nobody has many at once
            assert all(one.isprintable() and not set("/\\") & set(one) and 0 < len(one) <= 100 for one in told), name
    assert len(named) > len(NAMES) / 2


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "unicode_escape", "utf-7", "utf-16", "rot13", "nobody's"]
)
async def test_no_charset_breaks_it(ada: httpx2.AsyncClient, charset: str) -> None:
    """Python knows encodings that are none of text, and some make text that is none."""
    odd = rb"+2AA-\ud800" + "Å.".encode()
    for spoilt in ({"base": odd}, {odd.decode(): b"1"}, {}):
        body = form_of(encoded(FORM) | spoilt, [(odd, content) for _, content in GOOD])
        answer = await post(ada, body, f"{MULTIPART}; charset={charset}")
        assert answer.status_code == 202 or not wrong_answer(answer, 422) or not wrong_answer(answer, 400), answer.text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"name": "ada", "consent": true}', "application/json"),
        (b"name=ada&consent=true", "application/x-www-form-urlencoded"),
        (b"name=ada", ""),
        (b"", MULTIPART),
        (b"not a form", MULTIPART),
        (b"--x--", "multipart/form-data"),
        (b"--x", "multipart/form-data; boundary="),
        (form_of(encoded(FORM), [])[:-40], MULTIPART),
        (form_of(encoded({**FORM, "base": "x" * 20_000}), []), MULTIPART),
        (form_of(encoded({f"x{number}": "" for number in range(99)}), []), MULTIPART),
    ],
)
async def test_what_is_no_such_form_is_refused(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, body: bytes, kind: str
) -> None:
    answer = await post(ada, body, kind)
    assert not wrong_answer(answer, 400) or not wrong_answer(answer, 422), answer.text
    assert "JSON" not in answer.text
    assert await left(database, data_dir) == []


async def test_a_body_that_is_too_long_is_refused(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = form_of(encoded(FORM), [(b"1.png", bytes(5000))])
    monkeypatch.setitem(limits.UPLOADS, "/trainings", len(body))
    assert wrong_answer(await post(ada, body), 422, "no picture is good") is None  # it was read to its end

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    monkeypatch.setitem(limits.UPLOADS, "/trainings", len(body) - 1)
    assert wrong_answer(await post(ada, in_pieces()), 413) is None
    assert wrong_answer(await post(ada, body), 413) is None
    assert await left(database, data_dir) == []


async def test_a_body_that_says_it_is_too_long_is_not_waited_for(
    ada: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(limits.UPLOADS, "/trainings", 1000)
    read = list[bytes]()

    async def body() -> AsyncIterator[bytes]:
        read.append(b"x")
        yield b"x"

    assert wrong_answer(await post(ada, body(), **{"Content-Length": "1001"}), 413) is None
    assert read == []


@pytest.mark.parametrize("first", [b"", b"--" + BOUNDARY.encode(), form_of(encoded(FORM), [])[:-60]])
async def test_a_body_that_comes_too_slowly_is_refused(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)

    async def stalling() -> AsyncIterator[bytes]:
        yield first
        await asyncio.Event().wait()

    assert wrong_answer(await post(ada, stalling()), 408) is None
    assert await left(database, data_dir) == []


async def test_a_large_body_may_take_longer(ada: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a phone sends in minutes is no attack."""
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(limits, "BYTES_PER_SECOND", 1)
    body = form_of(encoded(FORM), [(b"1.png", bytes(5000))])

    async def slow() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2000):
            yield body[start : start + 2000]
            await asyncio.sleep(0.2)

    assert wrong_answer(await post(ada, slow()), 422, "no picture is good") is None  # it was read to its end
