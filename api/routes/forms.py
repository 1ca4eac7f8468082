"""Forms with files, read by hand once it is known who sends them; FastAPI would read them first."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from api.errors import InvalidRequest, StorageFull, StorageUnavailable
from api.routes.caller import CallerDep
from api.routes.service import ServiceDep
from api.whole import NO_ROOM

Fields = TypeVar("Fields", bound=BaseModel)
FILE = {"type": "string", "format": "binary"}
MOST_FIELDS = 32
FIELD_BYTES = 10_000


async def one_body(service: ServiceDep, caller: CallerDep) -> AsyncIterator[None]:
    """Counts a large body until it is answered. Raises LimitReached when its sender has too many on their way."""
    with service.accounts.bodies.one(caller.name):
        yield


@asynccontextmanager
async def opened(http: Request, files: int) -> AsyncIterator[FormData]:
    """Reads a form inside the block, its files onto the disk where temporary ones lie.

    Raises:
        InvalidRequest: it cannot be read.
        StorageFull, StorageUnavailable: that disk has no room.
    """
    try:
        form = await http.form(max_files=files, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES)
    except UnicodeError as error:
        raise InvalidRequest("the form cannot be read: its charset is not known") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the form broke off") from error  # for the log: nobody is there to be told
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull("the disk for what is sent is full") from error
        raise StorageUnavailable(f"what is sent cannot be kept meanwhile: {error.strerror}") from error
    try:
        yield form
    finally:
        await form.close()


def document(fields: type[BaseModel], **files: dict[str, Any]) -> dict[str, Any]:
    """Returns what OpenAPI says of a form with these fields and files."""
    schema = fields.model_json_schema()
    schema["properties"] |= files
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def read(form: FormData, fields: type[Fields], *files: str) -> Fields:
    """Returns the fields of a form, its files left out. Raises RequestValidationError."""
    return validated({name: value for name, value in form.items() if name not in files}, fields)


def validated(said: Mapping[str, Any], fields: type[Fields]) -> Fields:
    """Returns what a form said, field by field. Raises RequestValidationError."""
    try:
        return fields.model_validate(said)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


def uploads(form: FormData, name: str) -> list[UploadFile]:
    """Returns the files of a field. Raises InvalidRequest when it is text."""
    sent = form.getlist(name)
    files = [one for one in sent if isinstance(one, UploadFile)]
    if len(files) < len(sent):
        raise InvalidRequest(f"{name} is a file", f"With curl: -F {name}=@FILE.")
    return files
