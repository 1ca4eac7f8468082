"""Pictures: find them, look at them, fetch and delete them."""

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import FileResponse
from pydantic import BeforeValidator
from starlette.types import Receive, Scope, Send

from api.config import UserId
from api.domain import boards, library
from api.domain.library import Wanted
from api.errors import InvalidRequest, SitterError
from api.routes import etags
from api.routes.caller import CallerDep, UncountedDep, require
from api.routes.errors import error_answer, error_responses
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.images import MOST_STARS, Image, ImageChange, ImagePage
from api.wire.text import Text

router = APIRouter(prefix="/images", tags=["Images"])

RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")
CACHE = "private, max-age=31536000, immutable"  # a picture never changes; it may be deleted
DAY = re.compile(r"\d{4}-\d\d-\d\d")


def _whole_day(given: Any) -> Any:
    """A day is no midnight: left to itself, pydantic reads either as the other."""
    return date.fromisoformat(given) if isinstance(given, str) and DAY.fullmatch(given) else given


Moment = Annotated[datetime | date, BeforeValidator(_whole_day)]
ImageId = Annotated[Id, Path(description="Names the picture.", examples=["019a9f3c2d10b1946ac93f21d07e"])]


class RangeNotSatisfiable(SitterError):
    """The part that was asked for lies behind the end of the file."""

    status = 416
    code = "range_not_satisfiable"
    hint = "Ask for a part that begins before the file ends, or for the whole."


class WholeFile(FileResponse):
    """A file whose `Range` is not heeded."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the file."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def _part(wanted: str | None) -> tuple[int | None, int | None] | None:
    """Returns (first byte, None) or (None, length of the end) of one range; RFC 9110, 14.2 lets us ignore others."""
    match = RANGE.fullmatch(wanted.strip()) if wanted else None
    if match is None:
        return None
    first, last, length = match.groups()
    if length is not None:
        return None, int(length)
    return None if last and int(last) < int(first) else (int(first), None)


@router.get(
    "",
    summary="Find pictures",
    responses=error_responses(401, 403, 422, 429, 503),
    dependencies=[Depends(require("read"))],
)
async def list_images(
    service: ServiceDep,
    caller: CallerDep,
    words: Annotated[
        Text | None,
        Query(description="Words that all stand in the prompt; sensitive prompts are not searched.", max_length=200),
    ] = None,
    model: Annotated[
        Text | None,
        Query(
            description="Drawn by this model (`model_id`); without its `@version`, by any version of it.",
            max_length=500,
        ),
    ] = None,
    begin: Annotated[
        Moment | None,
        Query(alias="from", description="Drawn then or later: a day (UTC), or a time.", examples=["2026-01-07"]),
    ] = None,
    end: Annotated[
        Moment | None,
        Query(alias="to", description="Drawn before that time, or on that day or before.", examples=["2026-01-31"]),
    ] = None,
    tag: Annotated[Text | None, Query(description="Filed under this word.", max_length=64)] = None,
    rating: Annotated[int | None, Query(description="With so many stars or more.", ge=1, le=MOST_STARS)] = None,
    user_id: Annotated[UserId | None, Query(description="Whose; for administrators.")] = None,
    before: Annotated[Id | None, Query(description="Older than this picture.")] = None,
    limit: Annotated[int, Query(description="Most pictures on a page.", ge=1, le=100)] = 20,
) -> ImagePage:
    """Lists your pictures, newest first, a page at a time."""
    wanted = Wanted(words, model, moment(begin), moment(end, timedelta(days=1)), tag, rating)
    images = await library.page(service.database, service.vault, caller, user_id, wanted, before, limit)
    return ImagePage(images=images, before=images[-1].id if len(images) == limit else None)


def moment(given: date | datetime | None, day: timedelta = timedelta(0)) -> datetime | None:
    """Returns a time as it is, in UTC if it names no zone, and of a day its begin, moved by `day`.

    Raises:
        InvalidRequest: no calendar goes that far.
    """
    if given is None:
        return None
    try:
        if not isinstance(given, datetime):
            return datetime.combine(given, time(), UTC) + day
        return given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
    except OverflowError as error:
        raise InvalidRequest("this time is out of reach") from error


@router.get(
    "/{image_id}",
    summary="Look at a picture's record",
    responses=error_responses(401, 403, 404, 422, 429, 503),
    dependencies=[Depends(require("read"))],
)
async def show_image(image_id: ImageId, service: ServiceDep, caller: CallerDep) -> Image:
    """Says how, when and for whom a picture was drawn."""
    return await library.find(service.database, service.vault, caller, image_id)


@router.get(
    "/{image_id}/file",
    summary="Fetch a picture",
    response_class=Response,
    responses={
        200: {
            "description": "The PNG.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            "headers": {"ETag": {"description": "SHA-256 of the PNG.", "schema": {"type": "string"}}},
        },
        206: {
            "description": "The part that `Range` asks for.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        **etags.KNOWN,
        **error_responses(401, 403, 404, 416, 422, 429, 503),
    },
    dependencies=[Depends(require("read"))],
)
@router.head("/{image_id}/file", include_in_schema=False, dependencies=[Depends(require("read"))])
async def fetch_image(
    image_id: ImageId,
    service: ServiceDep,
    caller: CallerDep,
    if_none_match: etags.IfNoneMatch = None,
    range: Annotated[str | None, Header(description="A part of the file: `bytes=0-1023`.")] = None,
    if_range: Annotated[str | None, Header(description="Send the whole unless this is the ETag.")] = None,
    download: Annotated[bool, Query(description="Have browsers save it rather than show it.")] = False,
    plain: Annotated[bool, Query(description="Leave out what the file says of how it was made; always whole.")] = False,
) -> Response:
    """Sends the PNG, or the part of it that `Range` asks for."""
    file = await library.file_of(service.database, service.pictures, caller, image_id)
    headers = {"ETag": f'"{"plain-" if plain else ""}{file.sha256}"', "Cache-Control": CACHE}
    if etags.is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    disposition = "attachment" if download else "inline"
    if plain:
        headers["Content-Disposition"] = f'{disposition}; filename="{file.name}"'
        return Response(await library.plain(service.pictures, file), headers=headers, media_type="image/png")
    part = _part(range) if if_range in (None, headers["ETag"]) else None
    if part is not None and (part[1] == 0 or (part[0] or 0) >= file.bytes):
        error = RangeNotSatisfiable(f"the picture has {file.bytes} bytes")
        return error_answer(error, {"Content-Range": f"bytes */{file.bytes}"})
    kind = FileResponse if part is not None else WholeFile
    return kind(
        file.path,
        headers=headers,
        media_type="image/png",
        filename=file.name,
        content_disposition_type=disposition,
    )


@router.get(
    "/{image_id}/thumbnail",
    summary="Fetch a small picture",
    response_class=Response,
    responses={
        200: {
            "description": "A WebP of 384 pixels at most; the PNG itself where the disk has no room for one.",
            "content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}},
        },
        **etags.KNOWN,
        **error_responses(401, 403, 404, 422, 503),
    },
)
async def fetch_thumbnail(
    image_id: ImageId,
    service: ServiceDep,
    caller: UncountedDep,
    if_none_match: etags.IfNoneMatch = None,
) -> Response:
    """Sends a small version of a picture, for lists of many; it does not count among your requests."""
    caller.may("read")
    file = await library.file_of(service.database, service.pictures, caller, image_id)
    headers = {"ETag": f'"small-{file.sha256}"', "Cache-Control": CACHE}
    if etags.is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    return WholeFile(await library.thumbnail_of(service.pictures, file), headers=headers)


@router.patch(
    "/{image_id}",
    summary="Rate a picture, file it",
    responses=error_responses(401, 403, 404, 422, 429, 503),
    dependencies=[Depends(require("manage"))],
)
async def change_image(image_id: ImageId, change: ImageChange, service: ServiceDep, caller: CallerDep) -> Image:
    """Gives a picture stars, or files it under other words: its boards."""
    await boards.change(service.database, caller, image_id, change)
    return await library.find(service.database, service.vault, caller, image_id)


@router.delete(
    "/{image_id}",
    status_code=204,
    summary="Delete a picture",
    responses=error_responses(401, 403, 404, 422, 429, 503),
    dependencies=[Depends(require("manage"))],
)
async def delete_image(image_id: ImageId, service: ServiceDep, caller: CallerDep) -> None:
    """Deletes a picture: its record and its file."""
    await library.erase_image(service.database, service.pictures, caller, image_id)
