"""The registry: users' own models, their versions, and which of them draws a request."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from api.config import DEFAULT_USER, ModelSource, Settings
from api.domain.policy import ConsentMissing, consented
from api.engine.own import OwnModel
from api.errors import InvalidRequest, ModelUnavailable, NotFound
from api.schemas import GenerateRequest
from api.store.database import Database
from api.store.models import CHECKPOINT, INDEX, ModelFolder
from api.store.tables import Model, ModelVersion

TOKEN = "sks"  # the rare word that whoever is learned answers to


@dataclass(frozen=True)
class Known:
    """A version that a user has."""

    model_id: str
    owner: str
    name: str
    number: int
    version_id: str
    kind: str
    source: ModelSource  # of its base

    @property
    def label(self) -> str:
        """What the API calls it."""
        return f"{self.owner}/{self.name}@{self.number}"


Has = tuple[Model, ModelVersion | None, bool]
"""A model that a user has, a version of it or none, and whether whoever it shows agrees to it."""

Picked = Sequence[tuple[Known, float]]
"""Versions that draw a request, and how much each counts."""


async def known(session: AsyncSession, requests: Iterable[tuple[str, GenerateRequest]]) -> dict[str, list[Has]]:
    """Returns what these users have that may draw their requests, by user: published versions, and what is named."""
    users, names, numbers = set[str](), set[str](), set[int]()
    for user_id, request in requests:
        users.add(user_id)
        for name, number in _wanted(request):
            names.add(name)
            if number is not None:
                numbers.add(number)
    may_draw = ModelVersion.id == Model.published_id
    if numbers:  # all but never: without them each row is found by its key
        may_draw = or_(may_draw, and_(_called(names), ModelVersion.number.in_(numbers)))
    found = select(Model, ModelVersion, consented())
    found = found.outerjoin(ModelVersion, and_(ModelVersion.model_id == Model.id, may_draw))
    found = found.where(Model.user_id.in_(users), or_(Model.published_id.is_not(None), _called(names)))
    has = defaultdict[str, list[Has]](list)
    for model, version, may in await session.execute(found):
        has[model.user_id].append((model, version, may))
    return has


def _called(names: Collection[str]) -> ColumnElement[bool]:
    return or_(Model.name.in_(names), Model.id.in_(names))


def _wanted(request: GenerateRequest) -> list[tuple[str, int | None]]:
    """Returns the own models that a request names, and which version of each."""
    if request.adapters:
        return [(one.model, one.model_version) for one in request.adapters]
    return [] if request.model is None else [(request.model, request.model_version)]


def pick(has: Sequence[Has], request: GenerateRequest) -> Picked:
    """Returns the versions that draw `request`, of those that its user has; none where a configured model does.

    Raises:
        NotFound: it names a model or a version that the user does not have.
        InvalidRequest: no version of that model is published, or they are not over one base.
        ConsentMissing: whoever the model shows does not agree to it any more.
    """
    if request.adapters:
        picked = [(_named(has, one.model, one.model_version), one.weight) for one in request.adapters]
        if len({version.source for version, _ in picked}) > 1:
            raise InvalidRequest("the adapters are over different bases", "Name models of the same base.")
        if any(version.kind != "lora" for version, _ in picked):
            raise InvalidRequest("a whole model is no adapter", "Name it as `model`, alone.")
        return picked
    if request.model == DEFAULT_USER:
        return []
    if request.model is not None:
        return [(_named(has, request.model, request.model_version), 1.0)]
    published = [
        (model, version) for model, version, may in has if may and version and version.id == model.published_id
    ]
    if not published:
        return []
    return [(_known(*max(published, key=lambda own: (own[0].published_at, own[1].id))), 1.0)]


def _named(has: Sequence[Has], name: str, number: int | None) -> Known:
    versions = [own for own in has if name in (own[0].name, own[0].id)]
    if not versions:
        raise NotFound(f"there is no model {name} of this user", "GET /models lists them.")
    if not versions[0][2]:
        raise ConsentMissing(f"whoever {name} shows does not agree to it any more")
    for model, version, _ in versions:
        if version and (version.id == model.published_id if number is None else version.number == number):
            return _known(model, version)
    if number is None:
        raise InvalidRequest(f"no version of {name} is published", "Publish one, or name a model_version.")
    raise NotFound(f"{name} has no version {number}", "GET /models/{id}/versions lists them.")


def _known(model: Model, version: ModelVersion) -> Known:
    source = ModelSource.model_validate(version.source)
    return Known(model.id, model.user_id, model.name, version.number, version.id, version.kind, source)


async def own_models(
    database: Database, folder: ModelFolder, user_id: str, wanted: Sequence[tuple[str, float]]
) -> list[tuple[OwnModel, float]]:
    """Returns versions of a user's own models as the engine draws with them, and how much each counts.

    Whether they may be drawn with is asked anew: what was so when a job was accepted may be over.

    Raises:
        ModelUnavailable: one was erased.
        ConsentMissing: whoever one shows does not agree to it any more.
    """
    if not wanted:
        return []
    columns = select(ModelVersion, Model, consented()).join(Model, Model.id == ModelVersion.model_id)
    found = columns.where(ModelVersion.id.in_([version_id for version_id, _ in wanted]), Model.user_id == user_id)
    async with database.reading() as session:
        versions = {version.id: (version, model, may) for version, model, may in await session.execute(found)}
    own = list[tuple[OwnModel, float]]()
    for version_id, weight in wanted:
        if version_id not in versions:
            raise ModelUnavailable("the model that was to draw this was erased", "Ask again with another.")
        version, model, may = versions[version_id]
        if not may:
            raise ConsentMissing(f"whoever {model.name} shows does not agree to it any more")
        own.append((own_model(folder, model, version), weight))
    return own


def own_model(folder: ModelFolder, model: Model, version: ModelVersion) -> OwnModel:
    """Returns a version as the engine loads it."""
    base: dict[str, Any] = version.source
    if version.kind == "lora":
        where = {**base, "lora": str(folder.weights_of(version.id))}
    elif CHECKPOINT in version.files:  # its shapes and its tokenizer are those of the base that it was checked against
        where = {"base": str(folder.file_of(version.id, CHECKPOINT)), "config": base.get("config") or base["base"]}
    else:
        where = {"base": str(folder.file_of(version.id, INDEX).parent)}
    return OwnModel(
        **where,
        owner=model.user_id,
        name=model.name,
        number=version.number,
        version_id=version.id,
        sha256=version.sha256,
    )


async def open_model(session: AsyncSession, user_id: str, name: str, class_noun: str) -> Model:
    """Returns the user's model of that name, held; it is made if it is new.

    Raises:
        InvalidRequest: it shows something else than that class.
    """
    model = await session.scalar(select(Model).where(Model.user_id == user_id, Model.name == name).with_for_update())
    if model is None:
        model = Model(user_id=user_id, name=name, token=f"{TOKEN} {class_noun}", class_noun=class_noun)
        session.add(model)
        await session.flush()
    if model.class_noun != class_noun:
        raise InvalidRequest(
            f"{name} is a model of a {model.class_noun}, not of a {class_noun}", "Choose another name."
        )
    return model


def next_number(model: Model) -> int:
    """Returns what the next version of a model is called, which the transaction holds; no number comes twice."""
    model.last_number = (model.last_number or 0) + 1
    return model.last_number


def base_named(settings: Settings, name: str | None, user_id: str | None = None) -> ModelSource:
    """Returns the base that a model is trained over, or sent for; that of `default` if none is named.

    Args:
        settings: where bases are configured.
        name: what it is called there.
        user_id: whose model it is: what is everybody's or theirs will do. None is the operator: any base will.

    Raises:
        InvalidRequest: there is no such base.
    """
    if name is None:
        return settings.source_for(DEFAULT_USER).without_lora().itself()
    owners = settings.owners()  # a whole model that is one user's alone is no base for others
    configured = {
        source.base: source.without_lora().itself()
        for source in settings.user_models.values()
        if user_id is None or owners.get(source.base, user_id) == user_id
    }
    if name not in configured and user_id is None:
        return ModelSource(base=name)
    if name not in configured:
        raise InvalidRequest(f"there is no base {name}", f"There are {', '.join(sorted(configured))}.")
    return configured[name]
