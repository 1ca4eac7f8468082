"""/picture/ID: a picture, how it was made, and what may be made of it."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from api.domain import library
from api.errors import InvalidRequest
from api.routes.jobs import accept
from api.routes.pages import cards
from api.routes.pages.asked import again, key_of, new_key
from api.routes.pages.commands import commands
from api.routes.pages.forms import get_form
from api.routes.pages.look import PageRoute, go, page
from api.routes.pages.visitor import Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.images import Image
from api.wire.jobs import JobRequest
from api.wire.text import Text
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

VARIATIONS = 4
FURTHER = (-1.5, 1.5, -3.0, 3.0, 4.5, -4.5, 6.0, -6.0)  # of guidance, the nearest first
GUIDANCE = (1.0, 20.0)
ImageId = Annotated[Text, Path(max_length=64)]


@router.get("/picture/{image_id}")
async def show(request: Request, image_id: ImageId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """The picture, large."""
    image = await _find(service, visitor, image_id)
    newer, older = await library.neighbours(service.database, visitor.caller, image)
    order = await again(service, visitor, image)
    address = str(request.base_url).rstrip("/")
    with_key = service.settings.auth == "required"
    return page(
        request,
        visitor,
        "picture.html",
        image=image,
        who=cards.who(image.model_id),
        newer=newer,
        older=older,
        commands=commands(order, address, with_key) if order else {},
        grid=next((tag.removeprefix("grid:") for tag in image.tags if tag.startswith("grid:")), None),
        key=new_key(),
    )


@router.post("/page/pictures/{image_id}/again")
async def draw_again(request: Request, image_id: ImageId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Has it drawn again: with another seed, or in four nearby ways; leads to where that can be watched."""
    form = await get_form(request)
    order = await again(service, visitor, await _find(service, visitor, image_id))
    if order is None:
        raise InvalidRequest("this prompt is kept to its owner, so it cannot be drawn again", "Ask its owner.")
    how, key = form.get("how", "seed"), key_of(form)
    for number, one in enumerate(_orders(order, how)):
        await accept(one, service, visitor.caller, key and f"{key}-{how}-{number}")
    return go(request, "/")


@router.get("/picture/{image_id}/delete")
async def ask(request: Request, image_id: ImageId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Asks whether it shall really go, where no script offers to undo that."""
    return page(request, visitor, "delete.html", image=await _find(service, visitor, image_id))


@router.post("/picture/{image_id}/delete")
async def delete(request: Request, image_id: ImageId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Deletes it, and leads to the one that comes after it."""
    image = await _find(service, visitor, image_id)
    _, older = await library.neighbours(service.database, visitor.caller, image)
    await library.erase_image(service.database, service.pictures, visitor.caller, image_id)
    return go(request, f"/picture/{older}" if older else "/gallery")


async def _find(service: Service, visitor: Visitor, image_id: str) -> Image:
    return await library.find(service.database, service.vault, visitor.caller, image_id)


def _orders(order: JobRequest, how: str) -> Sequence[JobRequest]:
    """Returns what to draw. Raises InvalidRequest for a way that there is not."""
    assert order.seed is not None
    match how:
        case "seed":
            return [order.model_copy(update={"seed": None})]
        case "seeds":
            return [order.model_copy(update={"seed": order.seed + 1, "num_images": VARIATIONS})]
        case "guidance":
            least, most = GUIDANCE
            near = [order.guidance_scale + by for by in FURTHER if least <= order.guidance_scale + by <= most]
            return [order.model_copy(update={"guidance_scale": scale}) for scale in sorted(near[:VARIATIONS])]
        case _:
            raise InvalidRequest("a picture is varied in its seeds or in its guidance")
