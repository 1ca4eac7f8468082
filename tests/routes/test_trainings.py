"""POST /trainings: which pictures become a job, and all that is refused and leaves nothing."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import select

from api.domain.photos import ORIENTATION, choose
from api.domain.policy import STATEMENT, STATEMENTS, evidence
from api.errors import StorageFull
from api.main import create_app
from api.store.database import Database
from api.store.files import PictureFolder
from api.store.models import ModelFolder
from api.store.tables import Audit, Consent, Model, Request
from tests import archives, builders, people
from tests.archives import BZIP2, DEFLATED, LOCKED, LZMA, Entry, forged, packed
from tests.domain.test_photos import bomb, picture, stored
from tests.forms import FORM, GOOD, Sent, archive, kept, left, pictures, wrong_answer
from tests.jobs import count
from tests.memory import forget_peak, measured, peak
from tests.people import audited

pytestmark = pytest.mark.anyio

NOT_WHOLE = "bad.jpg: it is no whole JPEG, PNG or WebP"
NO_ZIP = "the archive is no ZIP that can be read"
TOO_FEW = "good, 3 are the least"


async def test_good_pictures_become_a_job(ada: httpx2.AsyncClient, database: Database, data_dir: Path) -> None:
    sent = pictures(*GOOD, ("../../again.png", GOOD[0][1]), ("notes.txt", b"no picture"))
    answer = await ada.post("/trainings", data={**FORM, "steps": "7", "flip": "true"}, files=sent)
    job = answer.json()
    assert (answer.status_code, job["kind"], job["status"], job["user_id"]) == (202, "train", "queued", "ada")
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert [tuple(one.values()) for one in job["training"]["pictures"]] == [
        *((name, True, None) for name, _ in GOOD),
        ("again.png", False, "it is the same as another one"),
        ("notes.txt", False, "it is no whole JPEG, PNG or WebP"),
    ]
    assert len(ModelFolder(data_dir).photos_of(job["id"])) == len(GOOD)
    async with database.reading() as session:
        row = (await session.scalars(select(Request))).one()
        model = (await session.scalars(select(Model))).one()
        consent = (await session.scalars(select(Consent))).one()
    asked = {name: row.parameters[name] for name in ("steps", "flip", "rank", "seed", "model")}
    assert asked == {"steps": 7, "flip": True, "rank": None, "seed": 0, "model": model.id}
    assert (model.user_id, model.name, model.token, model.published_id) == ("ada", "ada", "sks person", None)
    assert consent.model_id == model.id
    assert (await audited(database))[-1] == (consent.granted_by, "consent.granted", f"model:{model.id}")
    assert (await ada.get(f"/jobs/{job['id']}")).json()["training"] == job["training"]
    assert (await ada.get("/models")).json()["models"][0]["status"] == "untrained"


async def test_an_archive_does_as_well(ada: httpx2.AsyncClient, data_dir: Path) -> None:
    names = ["me/1.png", "me/2.png", "3.png", "__MACOSX/me/._1.png", "me/.DS_Store", "Thumbs.db"]
    contents = [content for _, content in GOOD] + [b"litter"] * 3
    packed_up = packed(*zip(names, contents, strict=True), method=DEFLATED)
    answer = await ada.post("/trainings", data=FORM, files=archive(packed_up))
    assert answer.status_code == 202, answer.text
    assert [one["name"] for one in answer.json()["training"]["pictures"]] == ["1.png", "2.png", "3.png"]
    assert len(ModelFolder(data_dir).photos_of(answer.json()["id"])) == len(GOOD)


async def test_what_is_agreed_to_is_told_and_proved(
    ada: httpx2.AsyncClient, database: Database, tmp_path: Path
) -> None:
    told = (await ada.get("/trainings/consent")).json()
    assert told == {"version": STATEMENT, "text": STATEMENTS[STATEMENT]}
    await ada.post("/trainings", data=FORM, files=pictures(*GOOD))
    proof = evidence(STATEMENT, [photo.sha256 for photo in choose(GOOD, tmp_path).photos])
    async with database.reading() as session:
        assert (await session.scalars(select(Consent.evidence))).one() == proof
        line = (await session.scalars(select(Audit.detail).order_by(Audit.seq.desc()))).first()
    assert line == {"statement": STATEMENT, "evidence": proof}


def posing(content: bytes) -> Sent:
    """Two good pictures, and a third that calls itself a JPEG."""
    return pictures(*GOOD[:2], ("bad.jpg", content))


def bad() -> Iterator[tuple[str, Sent, str]]:
    """What people send, by mistake or not, and what they are told of it; one after the other, as some are large."""
    jpeg, png, webp, gif = (stored(picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
    yield "a bomb", posing(bomb()), NOT_WHOLE
    yield "20k × 20k", posing(stored(Image.new("1", (20_000, 20_000)))), "bad.jpg: it has too many pixels"
    yield "a GIF", posing(gif), NOT_WHOLE
    yield "a GIF behind a JPEG's start", posing(b"\xff\xd8\xff\xe0" + gif), NOT_WHOLE
    yield "FITS", posing(b"SIMPLE  =                    T" + b" " * 5000), NOT_WHOLE
    yield "SVG", posing(b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"), NOT_WHOLE
    yield "HEIC", posing(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(4000)), NOT_WHOLE
    yield "half a JPEG", posing(jpeg[: len(jpeg) // 2]), NOT_WHOLE
    yield "half a PNG", posing(png[: len(png) // 2]), NOT_WHOLE
    yield "half a WebP", posing(webp[: len(webp) // 2]), NOT_WHOLE
    yield "no bytes", posing(b""), "bad.jpg: it is empty"
    yield "over 20 MB", posing(jpeg + bytes(20_000_000)), "bad.jpg: it has more than 20 MB"
    yield "the same one", pictures(*[GOOD[0]] * 5), f"1 picture is {TOO_FEW} (0.png: it is the same as another one"
    yield "two", pictures(*GOOD[:2]), f"2 pictures are {TOO_FEW}"
    yield "nothing", [], "send pictures or one archive"
    yield "both", pictures(*GOOD) + archive(packed(*GOOD)), "send pictures or one archive"
    yield "two archives", archive(packed(*GOOD)) * 2, "send pictures or one archive"
    yield "300 in an archive", archive(packed(*((f"{number}.png", b"x") for number in range(300)))), "holds 300 files"
    yield "a file outside", archive(packed(*GOOD, ("../4.png", GOOD[0][1]))), "lies outside of it"
    yield "a file outside of a Windows", archive(packed(*GOOD, ("me\\..\\..\\4.png", GOOD[0][1]))), "lies outside of it"
    yield "a file anywhere", archive(packed(*GOOD, ("/etc/4.png", GOOD[0][1]))), "lies outside of it"
    huge = forged(Entry(b"bad.jpg", archives.zeros(1000), DEFLATED, 2**32 - 16))
    yield "4 GB in an archive", archive(huge), "bad.jpg: it has more than 20 MB"
    gigabyte = archives.zeros(100)
    giants = forged(*(Entry(b"%d.jpg" % number, gigabyte, DEFLATED, 10**9) for number in range(10)))
    yield "10 GB in an archive", archive(giants), "9.jpg: it has more than 20 MB"
    yield "a million entries", archive(archives.crowded(1_000_000)), "the archive"
    yield "a password", archive(forged(Entry(b"1.png", bytes(64), flags=LOCKED, size=64))), NO_ZIP
    yield "LZMA that is none", archive(forged(Entry(b"1.png", b"\x09\x04\x05\0]\0\0\1\0" + b"\xff" * 99, LZMA))), NO_ZIP
    yield "bzip2 that is none", archive(forged(Entry(b"1.png", b"BZh9" + b"\xff" * 99, BZIP2, size=9))), NO_ZIP
    yield "another packer's", archive(b"Rar!\x1a\x07\x00" + bytes(100)), NO_ZIP
    yield "half an archive", archive(packed(*GOOD)[:4000]), NO_ZIP
    yield "no bytes of an archive", archive(b""), NO_ZIP
    yield "an empty archive", archive(packed()), f"no picture is {TOO_FEW}"
    yield "an archive in an archive", archive(packed(("1.zip", packed(*GOOD)))), "1.zip: it is no whole JPEG"


async def test_bad_pictures_are_told_why_and_nothing_is_kept(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    before, wrong = await audited(database), dict[str, str]()
    for what, files, reason in bad():
        try:
            answer = await ada.post("/trainings", data=FORM, files=files)
        except Exception as error:  # which a server answers with 500
            wrong[what] = repr(error)
        else:
            if found := wrong_answer(answer, 422, reason):
                wrong[what] = found
        if there := await left(database, data_dir):
            wrong[f"left of {what}"] = str(there)
    assert not wrong
    assert await audited(database) == before


async def test_more_files_than_anybody_needs_are_not_even_looked_at(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    answer = await ada.post("/trainings", data=FORM, files=pictures(*[("1.png", b"x")] * 300))
    assert wrong_answer(answer, 400, "Too many files") is None
    assert await left(database, data_dir) == []


async def test_the_same_key_makes_one_training(ada: httpx2.AsyncClient, database: Database, data_dir: Path) -> None:
    async def post(*more: tuple[str, bytes], **fields: str) -> httpx2.Response:
        sent, once = pictures(*GOOD, *more), {"Idempotency-Key": "once"}
        return await ada.post("/trainings", data={**FORM, **fields}, files=sent, headers=once)

    answers = [*await asyncio.gather(*(post() for _ in range(3))), await post()]
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
    [job_id] = {answer.json()["id"] for answer in answers}
    assert {answer.headers["Location"] for answer in answers} == {f"/jobs/{job_id}"}
    others = [await post(**fields) for fields in ({"steps": "5"}, {"name": "other"}, {"keep_pictures": "true"})]
    for other in [*others, await post(("4.png", stored(picture(9))))]:
        assert (other.status_code, other.json()["error"]) == (422, "idempotency_key_reused")
    assert [await count(database, table) for table in (Request, Model, Consent)] == [1, 1, 1]
    assert {path.split("/")[1] for path in kept(data_dir)} == {job_id}


@pytest.mark.parametrize("key", ["", "x" * 256, "\x01", "\x7f"])
async def test_no_key_but_a_word_is_taken(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, key: str
) -> None:
    answer = await ada.post("/trainings", data=FORM, files=pictures(*GOOD), headers={"Idempotency-Key": key})
    assert wrong_answer(answer, 422) is None
    assert await left(database, data_dir) == []


async def test_nobody_trains_in_anothers_name(
    app: FastAPI, ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    await people.add_user(database, "bo")
    answer = await ada.post("/trainings", data={**FORM, "user_id": "bo"}, files=pictures(*GOOD))
    assert wrong_answer(answer, 403) is None
    await people.add_user(database, "root", type="admin")
    async with people.client_of(app, await people.add_key(database, "root")) as root:
        nobody = await root.post("/trainings", data={**FORM, "user_id": "nobody"}, files=pictures(*GOOD))
        assert wrong_answer(nobody, 404) is None
        assert await left(database, data_dir) == []
        for_ada = await root.post("/trainings", data={**FORM, "user_id": "ada"}, files=pictures(*GOOD))
    assert (for_ada.status_code, for_ada.json()["user_id"]) == (202, "ada")
    async with database.reading() as session:
        granted_by = (await session.scalars(select(Consent.granted_by))).one()
    assert granted_by == (await audited(database))[-1][0]
    assert "root" in granted_by


async def test_a_base_is_one_that_is_configured(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, tmp_path: Path
) -> None:
    tricks = ["../../etc", "/etc/passwd", f"{tmp_path}/", f"{tmp_path}/../", "models/../models/demo", "somebody/model"]
    tricks += ["file:///etc", "http://example.com/", "", ".", "default", "ada", "models/sitters/ada", "MODELS/DEMO"]
    for named in tricks:
        answer = await ada.post("/trainings", data={**FORM, "base": named}, files=pictures(*GOOD))
        assert wrong_answer(answer, 422, "there is no base") is None, named
    assert await left(database, data_dir) == []
    answer = await ada.post("/trainings", data={**FORM, "base": "models/demo"}, files=pictures(*GOOD))
    assert answer.status_code == 202, answer.text
    async with database.reading() as session:
        assert (await session.scalars(select(Request))).one().parameters["source"] == {"base": "models/demo"}


async def test_a_base_that_one_user_has_is_for_nobody_else(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    """It may be a checkpoint that shows them, as Chi's does."""
    answer = await ada.post("/trainings", data={**FORM, "base": "models/sitters/chi"}, files=pictures(*GOOD))
    assert wrong_answer(answer, 422, "there is no base") is None
    other = await ada.post("/trainings", data={**FORM, "base": "nothing"}, files=pictures(*GOOD))
    assert "chi" not in other.text
    assert await left(database, data_dir) == []


async def test_whole_models_are_trained_where_the_operator_lets_it(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path
) -> None:
    whole = {**FORM, "kind": "full"}
    refused = await ada.post("/trainings", data=whole, files=pictures(*GOOD))
    assert wrong_answer(refused, 403, "whole models are not trained here") is None
    assert "FULL_TRAINING" in refused.json()["hint"]
    ranked = await ada.post("/trainings", data={**whole, "rank": "4"}, files=pictures(*GOOD))
    assert wrong_answer(ranked, 422, "no rank") is None
    assert await left(database, data_dir) == []


async def test_a_full_disk_keeps_nothing(
    ada: httpx2.AsyncClient, database: Database, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    async def no_room(*_: Any, **__: Any) -> None:
        raise StorageFull("the disk is full")

    last_of_all = "api.domain.trainings.audit.append"
    for where, what in (("api.store.models.write_whole", full), (last_of_all, no_room)):
        with monkeypatch.context() as patched:
            patched.setattr(where, what)
            answer = await ada.post("/trainings", data=FORM, files=pictures(*GOOD))
        assert wrong_answer(answer, 507) is None
        assert await left(database, data_dir) == []
    with monkeypatch.context() as patched:
        patched.setattr(PictureFolder, "require_room", no_room)
        assert wrong_answer(await ada.post("/trainings", data=FORM, files=pictures(*GOOD)), 507) is None
    assert (await ada.post("/trainings", data=FORM, files=pictures(*GOOD))).status_code == 202


MEASURE = """
import asyncio, sys
from pathlib import Path
from tests.routes.test_trainings import growth
print(asyncio.run(growth(Path(sys.argv[1]))))
"""


async def growth(folder: Path) -> int:
    """Returns how many bytes a request with the photos of `folder` takes over those that a small one takes."""
    settings = builders.settings(
        {"default": builders.source(folder)},
        auth="required",
        workers=0,
        database_url=f"sqlite:///{folder}/sitter.db",
        data_dir=folder / "data",
        output_dir=folder / "output",
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        await asyncio.to_thread(lambda: app.state.service.models.engine)  # torch is in memory by then
        database = app.state.service.database
        await people.add_user(database, "ada")
        async with people.client_of(app, await people.add_key(database, "ada")) as client:
            small = pictures(*((f"{seed}.jpg", stored(picture(seed), "JPEG")) for seed in range(3)))
            for _ in range(2):
                assert (await client.post("/trainings", data=FORM, files=small)).status_code == 202
            before = forget_peak()
            answer = await client.post("/trainings", data=FORM, files=opened(folder))
            grown = peak() - before
    assert answer.status_code == 202, answer.text
    assert all(one["good"] for one in answer.json()["training"]["pictures"])
    return grown


def opened(folder: Path) -> list[tuple[str, Any]]:
    return [("pictures", (path.name, path.open("rb"))) for path in sorted(folder.glob("*.jpg"))]


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """A folder of twenty photos of 12 megapixels, with the grain of a phone's; each is held another way."""
    size = (4032, 3024)
    grain = Image.effect_noise((2016, 1512), 60).convert("RGB").resize(size)
    scenes = [stored(Image.blend(picture(seed, *size), grain, 0.5), "JPEG", quality=85) for seed in range(3)]
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").write_bytes(turned(scenes[number // 8], number % 8 + 1))
    return tmp_path


def turned(jpeg: bytes, orientation: int) -> bytes:
    """The picture as a camera says that it was held, decoded by nobody."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    said = exif.tobytes()
    return jpeg[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2, "big") + said + jpeg[2:]


def test_twenty_large_photos_take_little_memory(phone: Path) -> None:
    assert 0 < measured(MEASURE, phone) < 50_000_000  # one is in memory, and its pixels a few times over
