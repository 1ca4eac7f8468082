"""/people: whom the visitor may draw: their pictures, versions and consent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response

from api.config import DEFAULT_USER
from api.domain import history, registry
from api.domain.policy import STATEMENTS
from api.errors import InvalidRequest, NotFound
from api.routes import forms
from api.routes.models import ModelId, Number
from api.routes.pages.curve import Curve, curve
from api.routes.pages.look import PageRoute, go, page
from api.routes.pages.sitters import MOST, SKS, faces_of, pictures_of, value_of
from api.routes.pages.training import under_way
from api.routes.pages.visitor import Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.jobs import Job
from api.wire.models import Model, ModelChange, Version
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

FACES = 4  # pictures on a card
Name = Annotated[str, Form(max_length=200)]


@dataclass(frozen=True)
class Person:
    """A model as it is shown.

    Attributes:
        model: the model.
        who: what names it where one draws; None where the visitor cannot draw with it.
        token: the words for whom it shows; None of the one who shows nobody.
        faces: addresses of pictures.
        version: the version that draws, else the newest.
        training: one of it that waits or runs.
        warm: whether it is in memory.
    """

    model: Model
    who: str | None
    token: str | None
    faces: list[str]
    version: Version | None
    training: Job | None
    warm: bool

    @property
    def name(self) -> str:
        """What people call it: of a configured one its user, nothing for whoever has none."""
        if self.model.status != "configured":
            return self.model.name
        return "" if self.model.user_id == DEFAULT_USER else self.model.user_id

    @property
    def draws(self) -> bool:
        """Whether it can be drawn with."""
        return self.who is not None and self.model.status in ("ready", "configured")


@router.get("/people")
async def people(
    request: Request, visitor: VisitorDep, service: ServiceDep, sheet: Annotated[int, Query(ge=1, le=1000)] = 1
) -> Response:
    """Everybody whom the visitor may draw, or soon can: MOST on a sheet."""
    training = await under_way(service, visitor)
    models = await registry.page(service.registry, visitor.caller, visitor.caller.user_id)
    is_last, models = len(models) <= sheet * MOST, models[(sheet - 1) * MOST : sheet * MOST]
    faces = await faces_of(service, visitor, models, FACES)
    everybody = [await _person(service, visitor, model, training.get(model.id), faces) for model in models]
    own = [person for person in everybody if person.model.status != "configured"]
    others = [person for person in everybody if person.model.status == "configured" and person.draws]
    others.sort(key=lambda person: person.name == "")  # nobody comes last
    live, more = any(one.training for one in own), None if is_last else f"/people?sheet={sheet + 1}"
    return page(request, visitor, "people.html", own=own, others=others, live=live, sheet=sheet, more=more)


@router.get("/people/{model_id}")
async def person(request: Request, model_id: ModelId, visitor: VisitorDep, service: ServiceDep) -> Response:
    """One of them: every version, how it was made, and what may be done about it."""
    model = await registry.find(service.registry, visitor.caller, model_id)
    faces = await faces_of(service, visitor, [model], FACES)
    one = await _person(service, visitor, model, (await under_way(service, visitor)).get(model.id), faces)
    made = await registry.versions(service.registry, visitor.caller, model.id)
    shown = [(version, pictures_of(version), await _curve(service, visitor, version)) for version in made]
    statement = STATEMENTS[model.consent.statement] if model.consent else None
    return page(request, visitor, "person.html", person=one, versions=shown, statement=statement)


@router.post("/page/people/{model_id}/publish/{number}")
async def publish(
    request: Request, model_id: ModelId, number: Number, visitor: VisitorDep, service: ServiceDep
) -> Response:
    """Has a version draw from now on."""
    visitor.caller.may("manage")
    await registry.publish(service.registry, visitor.caller, model_id, number)
    return go(request, f"/people/{model_id}")


@router.post("/page/people/{model_id}/rename")
async def rename(
    request: Request, model_id: ModelId, visitor: VisitorDep, service: ServiceDep, name: Name = ""
) -> Response:
    """Gives a model another name."""
    visitor.caller.may("manage")
    change = forms.validated({"name": name.strip()}, ModelChange)
    await registry.rename(service.registry, visitor.caller, model_id, change.name)
    return go(request, f"/people/{model_id}")


@router.post("/page/people/{model_id}/revoke")
async def revoke(
    request: Request, model_id: ModelId, visitor: VisitorDep, service: ServiceDep, typed: Name = ""
) -> Response:
    """Takes the consent back, once the name was typed."""
    await _confirm(service, visitor, model_id, typed)
    await registry.revoke(service.registry, visitor.caller, model_id)
    return go(request, f"/people/{model_id}")


@router.post("/page/people/{model_id}/erase")
async def erase(
    request: Request, model_id: ModelId, visitor: VisitorDep, service: ServiceDep, typed: Name = ""
) -> Response:
    """Erases a model, once its name was typed."""
    await _confirm(service, visitor, model_id, typed)
    await registry.erase(service.registry, visitor.caller, model_id)
    return go(request, "/people")


async def _confirm(service: Service, visitor: Visitor, model_id: str, typed: str) -> None:
    """Raises InvalidRequest unless the name of the model was typed."""
    visitor.caller.may("manage")
    model = await registry.find(service.registry, visitor.caller, model_id)
    if typed.strip() != model.name:
        raise InvalidRequest("nothing was deleted: that is not the name", f"Type {model.name} to go on.")


async def _person(
    service: Service, visitor: Visitor, model: Model, training: Job | None, faces: Mapping[str, list[str]]
) -> Person:
    made = await registry.versions(service.registry, visitor.caller, model.id) if model.versions else []
    version = next((one for one in made if one.published), made[0] if made else None)
    samples = pictures_of(version)[:FACES] if version else []
    token = model.token
    if model.status == "configured":
        token = None if model.user_id == DEFAULT_USER else SKS
    return Person(
        model,
        value_of(service, visitor, model),
        token,
        samples or faces.get(model.id, []),
        version,
        training,
        model.model_id in service.models.warm(),
    )


async def _curve(service: Service, visitor: Visitor, version: Version) -> Curve | None:
    """Returns the loss of the training that made a version; None of one that was sent, or is forgotten."""
    if version.job_id is None:
        return None
    try:
        seen = await history.find(service.database, visitor.caller, version.job_id)
    except NotFound:
        return None
    known = (seen.job.training or {}).get("losses", [])
    return curve(known, seen.job.step_count)
