"""/gallery: every picture, found again, kept in order, taken along or let go."""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Annotated, Any, Self
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends, Form, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from api.config import DEFAULT_USER
from api.domain import boards, bundles, library, registry
from api.domain.library import Wanted
from api.errors import InvalidRequest
from api.routes.images import moment
from api.routes.pages.cards import who
from api.routes.pages.look import PageRoute, came_from, go, is_part, page
from api.routes.pages.visitor import Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.images import MOST_STARS, Image
from api.wire.jobs import Tag
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

SHEET = 60  # pictures that come at once: whole rows of 2, 3, 4, 5 and 6
MOST_SHEETS = 10  # of a page that leads back to where somebody was
MOST_PICKED = 500
DROPPED = (("words",), ("model",), ("tag",), ("rating",), ("begin", "end"))  # what is dropped as one

Blank = BeforeValidator(lambda given: None if given == "" else given)  # a field of the form that nobody filled in
Words = Annotated[Text, Field(max_length=200)]
ModelId = Annotated[Text, Field(max_length=500)]
Stars = Annotated[int, Field(ge=0, le=MOST_STARS)]
TAG: TypeAdapter[str] = TypeAdapter(Tag)


class Asked(BaseModel):
    """Which pictures a gallery's address asks for."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    words: Annotated[Words | None, Blank] = None
    model: Annotated[ModelId | None, Blank] = None
    begin: Annotated[date | None, Blank] = Field(default=None, alias="from")
    end: Annotated[date | None, Blank] = Field(default=None, alias="to")
    tag: Annotated[Tag | None, Blank] = None
    rating: Annotated[Stars | None, Blank] = None
    before: Annotated[Id | None, Blank] = None  # older than this picture
    until: Annotated[Id | None, Blank] = None  # as many sheets as it takes to see this picture

    @property
    def filters(self) -> dict[str, str]:
        """What narrows the list, as the address says it."""
        asked = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"before", "until"})
        return {name: str(value) for name, value in asked.items()}

    def link(self, path: str = "/gallery", **more: str | None) -> str:
        """Returns an address with these filters."""
        values = self.filters | {name: value for name, value in more.items() if value}
        return f"{path}?{urlencode(values)}" if values else path

    def without(self, *names: str) -> Self:
        """Returns what would be asked without these filters, from the newest on."""
        return self.model_copy(update=dict.fromkeys((*names, "before", "until")))

    def wanted(self) -> Wanted:
        """Returns the same for the library. Raises InvalidRequest for a day out of reach."""
        begin, end = moment(self.begin), moment(self.end, timedelta(days=1))
        return Wanted(self.words, self.model, begin, end, self.tag, self.rating)


AskedDep = Annotated[Asked, Query()]


@dataclass(frozen=True)
class Found:
    """Sheets of pictures, the key of the one after them, and whether there may be newer pictures than these."""

    sheets: list[list[Image]]
    older: str | None
    newer: bool


@dataclass(frozen=True)
class Dropped:
    """A filter without which there are pictures: its name, what it says, and the address without it."""

    name: str
    says: str
    link: str


async def _picked(ids: Annotated[list[Id] | None, Form()] = None) -> list[str]:
    if not ids:
        raise InvalidRequest("no picture is selected", "Select some with the box in their corner.")
    if len(ids) > MOST_PICKED:
        raise InvalidRequest(f"{len(ids)} pictures are selected, and {MOST_PICKED} is the most", "Take them in parts.")
    return ids


PickedDep = Annotated[list[str], Depends(_picked)]
BoardForm = Annotated[str, Form(max_length=200)]


@router.get("/gallery")
async def gallery(request: Request, visitor: VisitorDep, service: ServiceDep, asked: AskedDep) -> Response:
    """The page; a script that filters gets the part of it that changes."""
    found = await _sheets(service, visitor, asked)
    all_of_them = [image for images in found.sheets for image in images]
    shown = next((image for image in all_of_them if image.id == asked.until), next(iter(all_of_them), None))
    values: dict[str, Any] = {
        "asked": asked,
        "found": found,
        "image": shown,
        "name": shown and who(shown.model_id),
        "dropped": [] if all_of_them else await _dropped(service, visitor, asked),
        "most": MOST_PICKED,
        "size": SHEET,
    }
    if is_part(request):
        part = page(request, visitor, "_found.html", **values)
        part.headers.update(_address(request, asked))
        return part
    own = await boards.boards(service.database, visitor.caller, visitor.caller.user_id)
    return page(request, visitor, "gallery.html", boards=own, people=await _people(service, visitor, asked), **values)


@router.get("/page/gallery")
async def sheet(request: Request, visitor: VisitorDep, service: ServiceDep, asked: AskedDep) -> Response:
    """The next sheet of pictures, and what asks for the one after it."""
    images, older = await _sheet(service, visitor, asked, asked.before)
    return page(request, visitor, "_sheet.html", asked=asked, images=images, older=older)


@router.get("/page/gallery/boards")
async def list_boards(request: Request, visitor: VisitorDep, service: ServiceDep, asked: AskedDep) -> Response:
    """The visitor's boards."""
    own = await boards.boards(service.database, visitor.caller, visitor.caller.user_id)
    return page(request, visitor, "_boards.html", asked=asked, boards=own)


@router.get("/page/gallery/{image_id}")
async def details(request: Request, image_id: Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """What stands beside the grid about a picture."""
    image = await library.find(service.database, service.vault, visitor.caller, image_id)
    return page(request, visitor, "_details.html", image=image, name=who(image.model_id))


@router.post("/page/gallery/rate")
async def rate(
    request: Request, visitor: VisitorDep, picked: PickedDep, rating: Annotated[Stars, Form()], service: ServiceDep
) -> Response:
    """Gives pictures stars; 0 takes them away."""
    await boards.rate(service.database, visitor.caller, picked, rating)
    return _done(request)


@router.post("/page/gallery/board")
async def put_on_board(
    request: Request, visitor: VisitorDep, picked: PickedDep, service: ServiceDep, board: BoardForm = ""
) -> Response:
    """Puts pictures on a board; a new name makes a new one."""
    await boards.put_on(service.database, visitor.caller, picked, _named(board))
    return _done(request)


@router.post("/page/gallery/unboard")
async def take_off_board(
    request: Request, visitor: VisitorDep, picked: PickedDep, service: ServiceDep, board: BoardForm = ""
) -> Response:
    """Takes pictures off a board."""
    await boards.take_off(service.database, visitor.caller, picked, _named(board))
    return _done(request)


@router.post("/page/gallery/delete")
async def erase(
    request: Request,
    visitor: VisitorDep,
    picked: PickedDep,
    service: ServiceDep,
    sure: Annotated[bool, Form()] = False,
) -> Response:
    """Deletes pictures. The page lets one undo that for a while before it asks for it; without a script it asks."""
    if not sure:
        return page(request, visitor, "gallery_delete.html", picked=picked)
    await library.erase_images(service.database, service.pictures, visitor.caller, picked)
    return _done(request)


@router.post("/page/gallery/zip")
async def take_along(visitor: VisitorDep, picked: PickedDep, service: ServiceDep) -> StreamingResponse:
    """Sends pictures as a ZIP."""
    parts = await bundles.pictures_of(service.database, service.pictures, visitor.caller, picked)
    headers = {"Content-Disposition": 'attachment; filename="pictures.zip"'}
    return StreamingResponse(parts, media_type="application/zip", headers=headers)


async def _sheet(
    service: Service, visitor: Visitor, asked: Asked, before: str | None
) -> tuple[list[Image], str | None]:
    """Returns a sheet of pictures, and the key of the next one if there is one."""
    caller, wanted = visitor.caller, asked.wanted()
    found = await library.page(service.database, service.vault, caller, caller.user_id, wanted, before, SHEET + 1)
    return found[:SHEET], found[SHEET - 1].id if len(found) > SHEET else None


async def _sheets(service: Service, visitor: Visitor, asked: Asked) -> Found:
    """Returns the first sheet, or all until a picture that somebody comes back from."""
    newer = asked.before is not None
    sheets, older = list[list[Image]](), asked.before
    for _ in range(MOST_SHEETS if asked.until else 1):
        images, older = await _sheet(service, visitor, asked, older)
        sheets += [images] if images else []
        if older is None or asked.until is None or asked.until >= older:
            return Found(sheets, older, newer)
    # It lies deeper than a page should be long: its own sheet comes first then.
    start = asked.model_copy(update={"before": f"{int(asked.until or '0', 16) + 1:028x}", "until": None})
    return await _sheets(service, visitor, start)


async def _dropped(service: Service, visitor: Visitor, asked: Asked) -> list[Dropped]:
    """Returns the filters each of which alone keeps every picture away."""
    found = list[Dropped]()
    for names in DROPPED:
        given = [getattr(asked, name) for name in names]
        if any(value is not None for value in given):
            rest = asked.without(*names)
            images, _ = await _sheet(service, visitor, rest, None)
            if images:
                says = " – ".join(str(value) for value in given if value is not None)
                found.append(Dropped(names[0], says, rest.link()))
    return found


async def _people(service: Service, visitor: Visitor, asked: Asked) -> dict[str, str]:
    """Returns whose pictures to choose from: model without its version → name, empty for the one who is nobody."""
    models = await registry.page(service.registry, visitor.caller, visitor.caller.user_id)
    named = {}
    for model in models:
        key = model.model_id.partition("@")[0]
        named[key] = "" if model.status == "configured" and model.user_id == DEFAULT_USER else who(key)
    return {asked.model: who(asked.model)} | named if asked.model else named


def _address(request: Request, asked: Asked) -> dict[str, str]:
    """Returns the header by which the address bar follows: words that are still typed make no history."""
    query = came_from(request).partition("?")[2].partition("#")[0]
    was, now = {name: value for name, value in parse_qsl(query) if name not in ("before", "until")}, asked.filters
    if was == now:
        return {}
    typing = "words" in was and was | {"words": ""} == now | {"words": ""}
    return {"HX-Replace-Url" if typing else "HX-Push-Url": asked.link()}


def _named(board: str) -> str:
    """Returns the name of a board. Raises InvalidRequest for what is none."""
    try:
        return TAG.validate_python(" ".join(board.split()))
    except ValidationError as error:
        hint = "Type one, or choose one that is there."
        raise InvalidRequest("a board has a name of 1 to 64 characters", hint) from error


def _done(request: Request) -> Response:
    """Returns the answer to what was done: none for a script, else the page that it was asked from."""
    if is_part(request):
        return Response(status_code=204)
    came = came_from(request)
    return go(request, came if came.partition("?")[0] == "/gallery" or came.startswith("/picture/") else "/gallery")
