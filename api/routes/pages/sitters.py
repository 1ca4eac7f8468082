"""Who can be drawn: the faces that a visitor chooses from."""

from dataclasses import dataclass

from api.config import DEFAULT_USER
from api.domain import library, registry
from api.domain.library import Wanted
from api.routes.pages.visitor import Visitor
from api.wire.models import Model, Version
from api.wiring import Service

SKS = "sks person"  # what the operator's sitters answer to, as a rule


@dataclass(frozen=True)
class Sitter:
    """Somebody to choose: `value` names user and model in a form, `token` is the words for them in a prompt."""

    value: str
    name: str
    token: str | None
    face: str | None
    warm: bool

    @property
    def user_id(self) -> str:
        """Whose model draws."""
        return self.value.partition("/")[0]

    @property
    def model(self) -> str:
        """Which of them."""
        return self.value.partition("/")[2]


async def sitters(service: Service, visitor: Visitor) -> list[Sitter]:
    """Returns whom the visitor may draw: their own models, then the operator's; those who need no model come last."""
    models = await registry.page(service.registry, visitor.caller, None)
    warm = service.models.warm()
    found = list[Sitter]()
    for model in models:
        value = value_of(service, visitor, model)
        if value is None or model.status not in ("ready", "configured"):
            continue
        own = model.status == "ready"
        nobody = not own and model.user_id == DEFAULT_USER
        name = model.name if own else "" if nobody else model.user_id
        token = model.token if own else None if nobody else SKS
        face = await _face(service, visitor, model)
        found.append(Sitter(value, name, token, face, model.model_id in warm))
    return sorted(found, key=lambda one: one.name == "")


def value_of(service: Service, visitor: Visitor, model: Model) -> str | None:
    """Returns what names a model in a form; None for what the visitor cannot draw with."""
    caller = visitor.caller
    if model.status != "configured":
        return f"{model.user_id}/{model.name}"
    if caller.may_see(model.user_id):
        return f"{model.user_id}/{DEFAULT_USER}"
    if caller.user_id in service.settings.user_models:
        return None  # what is configured for them stands in the place of everybody's
    return f"{caller.user_id}/{DEFAULT_USER}"


async def _face(service: Service, visitor: Visitor, model: Model) -> str | None:
    if model.version is not None:
        made = await registry.versions(service.registry, visitor.caller, model.id)
        if samples := next((pictures_of(one) for one in made if one.published), []):
            return samples[0]
    return next(iter(await drawn_with(service, visitor, model, 1)), None)


async def drawn_with(service: Service, visitor: Visitor, model: Model, most: int) -> list[str]:
    """Returns addresses of what a model drew last for the visitor; administrators see no others' here."""
    wanted, caller = Wanted(model=model.model_id), visitor.caller
    drawn = await library.page(service.database, service.vault, caller, caller.user_id, wanted, None, most)
    return [f"/images/{image.id}/thumbnail" for image in drawn]


def pictures_of(version: Version) -> list[str]:
    """Returns addresses of a version's samples; of one that was sent there are other files besides, and no samples."""
    return [address for address in version.samples if address.endswith(".png")]
