"""Who can be drawn: the faces that a visitor chooses from."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from api.config import DEFAULT_USER
from api.domain import described, library, registry
from api.errors import NotFound
from api.routes.pages.visitor import Visitor
from api.wire.models import Model, Version
from api.wiring import Service

SKS = "sks person"  # what the operator's sitters answer to, as a rule
MOST = 100  # faces to choose from, and on a page
LOOKED_THROUGH = 500  # last pictures, for one that each model drew


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


async def sitters(service: Service, visitor: Visitor, asked: str | None = None) -> list[Sitter]:
    """Returns whom the visitor may draw: their own models, then the operator's; those who need no model come last.

    Of more than MOST those are left out that are made first, but never whose value was `asked` for.
    """
    listed = await registry.page(service.registry, visitor.caller, None, limit=MOST)
    user_id = visitor.caller.user_id
    always = described.configured(
        service.settings, user_id if user_id in service.settings.user_models else DEFAULT_USER
    )
    models = {value_of(service, visitor, model): model for model in [*listed[: MOST - 1], always]}
    if asked and asked not in models:
        with suppress(NotFound):
            models[asked] = await registry.named(service.registry, visitor.caller, *asked.partition("/")[::2])
    faces, warm = await faces_of(service, visitor, list(models.values()), 1), service.models.warm()
    found = list[Sitter]()
    for value, model in models.items():
        if value is None or model.status not in ("ready", "configured"):
            continue
        own = model.status == "ready"
        nobody = not own and model.user_id == DEFAULT_USER
        name = model.name if own else "" if nobody else model.user_id
        token = model.token if own else None if nobody else SKS
        face = next(iter(faces.get(model.id, [])), None)
        found.append(Sitter(value, name, token, face, model.model_id in warm))
    return sorted(found, key=lambda one: one.name == "")


def value_of(service: Service, visitor: Visitor, model: Model) -> str | None:
    """Returns what names a model in a form; None for what the visitor cannot draw with."""
    user_id = visitor.caller.user_id
    if model.status != "configured":
        return f"{model.user_id}/{model.name}"
    if user_id in (None, model.user_id):
        return f"{model.user_id}/{DEFAULT_USER}"
    if model.user_id != DEFAULT_USER or user_id in service.settings.user_models:
        return None  # what is configured for them stands in the place of everybody's
    return f"{user_id}/{DEFAULT_USER}"


async def faces_of(service: Service, visitor: Visitor, models: Sequence[Model], most: int) -> dict[str, list[str]]:
    """Returns addresses of up to `most` pictures of each model, by its id.

    They are samples of the version that draws, else what the model drew lately for the visitor: not for others, whom
    administrators could see, too.
    """
    drawing = await registry.published(service.registry, models)
    drawn = dict[str, list[str]]()
    for image_id, names in await library.drawn_lately(service.database, visitor.caller.user_id, LOOKED_THROUGH):
        for name in names.split("+"):  # as in eve/eve@1+eve/bob@2
            drawn.setdefault(name.partition("@")[0], []).append(f"/images/{image_id}/thumbnail")
    return {
        model.id: (
            (pictures_of(drawing[model.id]) if model.id in drawing else [])
            or drawn.get(model.model_id.partition("@")[0], [])
        )[:most]
        for model in models
    }


def pictures_of(version: Version) -> list[str]:
    """Returns addresses of a version's samples; of one that was sent there are other files besides, and no samples."""
    return [address for address in version.samples if address.endswith(".png")]
