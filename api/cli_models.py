"""`sitter models`: users' own models and their versions, straight in the registry, beside a running server."""

import shutil
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Column, Table

from api.cli_people import caller, console, errors_for_people, in_database, require_place, to_people, written
from api.config import ModelSource, Settings, load_settings
from api.domain import models as own_models
from api.domain import registry
from api.domain.models import Picked
from api.domain.registry import Kept, Registry
from api.domain.wake import Wake
from api.domain.zips import zipped
from api.engine.own import OwnModel
from api.errors import NotFound
from api.model_service import ModelService
from api.schemas import GenerateRequest
from api.store.database import Database
from api.store.models import ModelFolder
from api.wire.models import Model, Version
from api.wiring import configure_logging

T = TypeVar("T")
LARGEST = 2**31 - 1  # of a version's number

models = typer.Typer(help="Users' own models: list, publish, roll back, export, erase.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the model is called.")]
Number = Annotated[int, typer.Argument(metavar="VERSION", min=1, max=LARGEST, help="As `versions` lists it.")]
Owner = Annotated[str | None, typer.Option("--user", help="Whose it is (the model's name).", show_default=False)]


@models.command("list")
def list_models(user: Annotated[str | None, typer.Option(help="Theirs alone (everybody's).")] = None) -> None:
    """List models: users' own, and at the end those of USER_MODELS."""
    status, created = Column("status", no_wrap=True), Column("created", no_wrap=True)
    table = Table("user", "model", "versions", "draws", status, "token", created)

    async def work(own: Registry) -> list[Model]:
        return await registry.page(own, caller(), user)

    with errors_for_people():
        for model in _run(work):
            numbers = [str(number) if number else "" for number in (model.versions, model.version)]
            begun = f"{model.created_at:%Y-%m-%d}" if model.created_at else ""
            cells = [model.user_id, model.name, *numbers, model.status, model.token or "", begun]
            table.add_row(*map(escape, cells))
    console.print(table)


@models.command("versions")
def list_versions(name: Name, user: Owner = None) -> None:
    """List a model's versions, newest first: how each was made, and how good it is."""
    obedience, created = Column("obedience", no_wrap=True), Column("created", no_wrap=True)
    table = Table("version", "draws", "kind", "steps", "likeness", obedience, "class kept", created)
    with errors_for_people():
        model, versions = _run(lambda own: _versions(own, name, user))
        for version in versions:
            cells = [version.version, "yes" if version.published else "", version.kind]
            cells.append(version.parameters.get("step", ""))
            scores = [version.scores.get(score) for score in ("likeness", "obedience", "class_kept")]
            cells += ["" if score is None else f"{score:.2f}" for score in scores]
            table.add_row(*(escape(str(cell)) for cell in cells), f"{version.created_at:%Y-%m-%d}")
    console.print(table)
    for version in versions:
        if version.refusal:
            to_people.print(escape(f"{label(model, version.version)}: {version.refusal}"))


@models.command("publish")
def publish_version(name: Name, version: Number, user: Owner = None) -> None:
    """Have a version draw from now on: a newer one, or an older one again."""

    async def work(own: Registry) -> Model:
        model = await _named(own, name, user)
        with _lists_versions(name, user):
            return await registry.publish(own, caller(), model.id, version)

    with errors_for_people():
        published = _run(work)
        to_people.print(f"{escape(published.model_id)} draws from now on.")


@models.command("rollback")
def roll_back(name: Name, user: Owner = None) -> None:
    """Have the good version before the published one draw again."""

    async def work(own: Registry) -> Model:
        model, versions = await _versions(own, name, user)
        if model.version is None:
            raise NotFound(f"no version of {label(model)} is published", _see_versions(name, user))
        good = [one.version for one in versions if one.version < model.version and one.refusal is None]
        if not good:
            raise NotFound(f"there is no good version before {model.model_id}", _see_versions(name, user))
        return await registry.publish(own, caller(), model.id, max(good))

    with errors_for_people():
        published = _run(work)
        to_people.print(f"{escape(published.model_id)} draws again.")


@models.command("export")
def export_version(
    name: Name,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="FILE.safetensors, FILE.zip of a whole model; what is there is replaced."),
    ],
    user: Owner = None,
    version: Annotated[int | None, typer.Option(min=1, max=LARGEST, help="Which (the published one).")] = None,
    kohya: Annotated[bool, typer.Option("--kohya", help="With kohya's keys, for A1111 and ComfyUI.")] = False,
) -> None:
    """Write a version's weights to a file: a LoRA that diffusers loads, say."""

    async def work(own: Registry) -> Model:
        model = await _named(own, name, user)
        with _lists_versions(name, user):
            kept = await registry.weights_of(own, caller(), model.id, version)
        require_place(output, ending(kept.file is None), "a model's file")
        await write_model(kept, output, await registry.as_kohya(kept) if kohya else None)
        return model

    with errors_for_people():
        model = _run(work)
        of = escape(label(model, version or model.version))
        to_people.print(f"{escape(str(output))}: {of}{', with kohya’s keys' if kohya else ''}", soft_wrap=True)


def ending(whole: bool) -> str:
    """Returns how the name of a file ends that a model is written to."""
    return ".zip" if whole else ".safetensors"


async def write_model(kept: Kept, output: Path, converted: bytes | None = None) -> None:
    """Writes a version's weights, as they are or `converted`. Raises StorageUnavailable."""
    with written(output) as part:
        if converted is not None:
            part.write_bytes(converted)
        elif kept.file is not None:
            shutil.copyfile(kept.file, part)
        else:
            with part.open("wb") as file:
                async for data in zipped(kept.files, kept.made):
                    file.write(data)


@models.command("revoke")
def revoke_consent(name: Name, user: Owner = None) -> None:
    """Take the consent back: nobody draws with the model any more, and its files and photos are deleted."""

    async def work(own: Registry) -> Model:
        model = await _named(own, name, user)
        return await registry.revoke(own, caller(), model.id)

    with errors_for_people():
        revoked = _run(work)
        to_people.print(
            f"Nobody draws with {escape(revoked.model_id)} any more; its files and photos are deleted.\n"
            "With their consent it can be trained anew."
        )


@models.command("erase")
def erase_model(
    name: Name, user: Owner = None, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Erase a model for good: its versions, files, photos and jobs under way. The pictures that it drew stay."""
    with errors_for_people():
        model = _run(lambda own: _named(own, name, user))
        versions = "1 version" if model.versions == 1 else f"{model.versions} versions"
        if not yes:
            typer.confirm(f"Erase {label(model)} with {versions}, for good?", abort=True, err=True)
        _run(lambda own: registry.erase(own, caller(), model.id))
        to_people.print(f"{escape(label(model))} is erased.")


def drawn_with(settings: Settings, request: GenerateRequest) -> tuple[ModelSource, list[tuple[OwnModel, float]]]:
    """Returns whose base draws a request, and its user's own models over that: none where a configured one draws.

    Raises:
        SitterError: it names a model that cannot draw it.
    """

    async def work(database: Database) -> tuple[ModelSource, list[tuple[OwnModel, float]]]:
        picked = await picked_for(database, request)
        wanted = [(version.version_id, weight) for version, weight in picked]
        own = await own_models.own_models(database, ModelFolder(settings.data_dir), request.user_id, wanted)
        return picked[0][0].source if picked else settings.source_for(request.user_id), own

    try:
        return in_database(settings, work)
    except NotFound as error:
        raise NotFound(error.detail, f"`sitter models list --user {request.user_id}` lists them.") from error


async def picked_for(database: Database, request: GenerateRequest) -> Picked:
    """Returns the versions that draw a request of its user. Raises as `domain.models.pick` does."""
    async with database.reading() as session:
        known = await own_models.known(session, [(request.user_id, request)])
    return own_models.pick(known[request.user_id], request)


def label(model: Model, version: int | None = None) -> str:
    """Returns what pictures and jobs call a version of a model, or the model itself."""
    name = f"{model.user_id}/{model.name}"
    return name if version is None else f"{name}@{version}"


class _NoModels(ModelService):
    """The models in this process's memory: none, and no torch is imported for them."""

    def __init__(self) -> None:
        """Starts nothing."""

    def revoke(self, version_ids: Collection[str]) -> None:
        """Drops nothing: servers and workers see in the audit what they have to drop."""


def _run(work: Callable[[Registry], Awaitable[T]]) -> T:
    """Returns what `work` does with the registry."""
    settings = load_settings(log_level="warning")
    configure_logging(settings.log_level)
    folder = ModelFolder(settings.data_dir)
    return in_database(settings, lambda database: work(Registry(settings, database, folder, _NoModels(), Wake())))


async def _named(own: Registry, name: str, user: str | None) -> Model:
    """Returns a user's own model. Raises NotFound."""
    owner = user or name
    for model in await registry.page(own, caller(), owner):
        if (model.user_id, model.name) == (owner, name) and model.status != "configured":
            return model
    whose = "" if user else " Is it somebody else's? Say --user."
    raise NotFound(f"{owner} has no model {name}", f"`sitter models list` shows those that are there.{whose}")


async def _versions(own: Registry, name: str, user: str | None) -> tuple[Model, list[Version]]:
    model = await _named(own, name, user)
    return model, await registry.versions(own, caller(), model.id)


@contextmanager
def _lists_versions(name: str, user: str | None) -> Iterator[None]:
    """Says of what is not found where those that are there are listed."""
    try:
        yield
    except NotFound as error:
        raise NotFound(error.detail, _see_versions(name, user)) from error


def _see_versions(name: str, user: str | None) -> str:
    return f"`sitter models versions {name}{f' --user {user}' if user else ''}` lists those that are there."
