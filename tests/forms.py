"""Forms as they are sent to POST /trainings, and what may be left of them."""

from pathlib import Path

import httpx2

from api.store.database import Database
from api.store.tables import Consent, Model, ModelVersion, Request
from tests.domain.test_photos import picture, stored
from tests.jobs import count

FORM = {"name": "ada", "consent": "true"}
GOOD = [(f"{seed}.png", stored(picture(seed))) for seed in range(3)]
BOUNDARY = "the-boundary-of-a-form"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
Sent = list[tuple[str, tuple[str, bytes]]]


def pictures(*files: tuple[str, bytes]) -> Sent:
    return [("pictures", file) for file in files]


def archive(content: bytes) -> Sent:
    return [("archive", ("ada.zip", content))]


def form_of(fields: dict[str, bytes], files: list[tuple[bytes, bytes]]) -> bytes:
    """A form with pictures as bytes: clients escape what they are given."""
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode()
    parts = [start + b'"%s"\r\n\r\n%s\r\n' % (name.encode(), value) for name, value in fields.items()]
    parts += [start + b'"pictures"; filename="%s"\r\n\r\n%s\r\n' % file for file in files]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def wrong_answer(answer: httpx2.Response, status: int, reason: str = "") -> str | None:
    """Returns None for a refusal in the one shape with that reason, else what was answered."""
    try:
        said: dict[str, str] = answer.json()
    except ValueError:
        said = {}
    shaped = said.keys() == {"error", "detail", "hint"} and all(said.values())
    if answer.status_code == status and shaped and reason in said["detail"]:
        return None
    return f"{answer.status_code} {answer.text[:300]}"


async def left(database: Database, data_dir: Path) -> list[str]:
    """What there is of trainings, on the disk and in the database."""
    rows = [table.__tablename__ for table in (Request, Model, ModelVersion, Consent) if await count(database, table)]
    return kept(data_dir) + rows


def kept(data_dir: Path) -> list[str]:
    """Every file and folder of trainings and models."""
    return [
        str(path.relative_to(data_dir)) for room in ("trainings", "models") for path in (data_dir / room).rglob("*")
    ]
