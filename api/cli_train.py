"""`sitter train`: a folder of pictures becomes a version of a user's own model, without a server."""

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from re import fullmatch
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from PIL import Image
from rich.markup import escape
from sqlalchemy import select

from api.cli_models import ending, label, picked_for, write_model
from api.cli_people import caller, errors_for_people, progress, require_place, to_people, told_to_end, written
from api.config import USER_ID, Settings, load_settings
from api.domain import history, leftovers, registry, trainings
from api.domain.history import ENDED, Seen
from api.domain.models import base_named
from api.domain.photos import LEAST, MOST, MOST_BYTES, MOST_FILES, Chosen, choose, require_enough
from api.domain.policy import STATEMENT, STATEMENTS
from api.domain.trainings import TrainingOrder
from api.errors import Cancelled, Forbidden, InvalidRequest, NotFound, from_code
from api.schemas import GenerateRequest
from api.store.models import SAMPLE, sha256
from api.store.tables import Request
from api.wire.models import MOST_RANK, MOST_STEPS, NOUN, Kind, Model, TrainingRequest, Version
from api.wiring import Service, open_service, working

CTRL_C = 130  # the exit code of every command that it ends


@dataclass(frozen=True)
class _Wishes:
    """What is wished besides the version itself."""

    again: bool
    sheet: Path | None
    weights: Path | None


def train_sitter(
    pictures: Annotated[Path, typer.Argument(help=f"Folder with {LEAST} to {MOST} pictures of one person.")],
    name: Annotated[str, typer.Option(help="What the model shall be called.")],
    consent: Annotated[bool, typer.Option("--consent", help="Whoever is in the pictures agrees to it.")] = False,
    consent_days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="For how many days they agree (until it is taken back).")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Whose it shall be (the model's name).", show_default=False)] = None,
    class_noun: Annotated[str, typer.Option("--class", help="What they are: person, dog…")] = "person",
    base: Annotated[str | None, typer.Option(help="The model to train over (that of `default`).")] = None,
    kind: Annotated[Kind, typer.Option(help="A LoRA, or a whole model: every weight learns.")] = "lora",
    steps: Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, help="Of training (the base's own).")] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=MOST_RANK, help="Of the factors [16].")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed trains the same model.")] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Learn from mirror images, too.")] = False,
    resolution: Annotated[
        int | None, typer.Option(min=256, max=1024, help="Pixels of the squares that are learned (the base's own).")
    ] = None,
    train_text_encoder: Annotated[
        bool, typer.Option("--train-text-encoder", help="Let the words learn, too: closer, and slower.")
    ] = False,
    prior_preservation: Annotated[bool, typer.Option(help="Keep the class as it is.")] = True,
    keep_pictures: Annotated[
        bool, typer.Option("--keep-pictures", help="Keep copies of the pictures after the training.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Where its samples go [NAME.png; NAME-VERSION.png where that is taken].")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="FILE.safetensors to write its LoRA to as well; FILE.zip of a whole model."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train anew what was trained before.")] = False,
) -> None:
    """Train a model of somebody from a few pictures: a new version of it draws them from then on.

    The answer to `sks` and the class noun is then whoever is in the pictures: "photo of sks person as a knight".
    Ended halfway, the same command goes on where it was.
    """
    with errors_for_people():
        if not consent:
            said = f'With --consent you say: "{STATEMENTS[STATEMENT]}"'
            raise Forbidden("nobody is learned without their consent", said)
        if not fullmatch(USER_ID, name):
            raise InvalidRequest(f"{name} cannot be a model's name", "Letters, digits and . _ @ - will do.")
        if not fullmatch(NOUN, class_noun):
            raise InvalidRequest(f"{class_noun} cannot be what they are", "Small letters will do: person, dog…")
        asked = TrainingRequest(
            name=name,
            class_noun=class_noun,
            consent=consent,
            consent_days=consent_days,
            user_id=user or name,
            base=base,
            kind=kind,
            steps=steps,
            rank=rank,
            seed=seed,
            flip=flip,
            resolution=resolution,
            train_text_encoder=train_text_encoder,
            prior_preservation=prior_preservation,
            keep_pictures=keep_pictures,
        )
        if sheet is not None:
            require_place(sheet, ".png", "a picture")
        if output is not None:
            require_place(output, ending(kind == "full"), "a model's file")
        settings = load_settings(log_level="error")
        with TemporaryDirectory(prefix="sitter-") as place:
            chosen, base_source = _chosen(pictures, Path(place)), base_named(settings, asked.base)
            order = TrainingOrder.of(asked, asked.user_id or name, chosen, base_source, caller().name)
            done = asyncio.run(_train(settings, order, _Wishes(force, sheet, output)))
    if not done:
        to_people.print(
            "Stopped. What is learned so far is kept: it goes on when you say the same again, or in a server or "
            "`sitter worker` over the same database."
        )
        raise typer.Exit(CTRL_C)


def _chosen(folder: Path, place: Path) -> Chosen:
    """Returns the good photos of a folder, kept in `place`, and says of each other file why it is none."""
    if not folder.is_dir():
        raise InvalidRequest(f"there is no folder {folder}", "Say where the pictures are.")
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
        if len(files) > MOST_FILES:
            raise InvalidRequest(f"{folder} holds {len(files)} files", f"{MOST} pictures are enough.")
        chosen = choose(((file.name, _read(file)) for file in files), place)
    except OSError as error:
        told = f"{error.filename} cannot be read: {error.strerror}"
        raise InvalidRequest(told, "Let it be read, or take it away.") from error
    for name, reason in chosen.verdicts:
        if reason is not None:
            to_people.print(f"  {escape(name)}: {reason}")
    require_enough(len(chosen.photos))
    return chosen


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MOST_BYTES + 1)  # enough to see that it is too large


async def _train(settings: Settings, order: TrainingOrder, wishes: _Wishes) -> bool:
    """Trains, or goes on with what was begun, and tells what became of it. Returns False when it was ended before.

    A server or worker over the same database may do the work instead.
    """
    told = told_to_end()
    async with open_service(settings) as service:
        job = await _job(service, order, wishes.again)
        if job.status in ENDED:
            when = f"{job.finished_at:%Y-%m-%d %H:%M} UTC"
            to_people.print(f"This was trained already ({when}). Say --force, or change an option, to train anew.")
        else:
            async with working(service, 1):
                job = await _follow(service, job, told)
        if job.status not in ENDED:
            return False
        try:
            await _tell(service, job, wishes)
        finally:
            await leftovers.sweep_trainings(service.folder, service.database)  # the pictures shall not stay
    return True


async def _job(service: Service, order: TrainingOrder, again: bool) -> Request:
    """Returns the job of this very order: one that is under way, else one whose version is there, else a new one."""
    key = _key(order)
    same = select(Request).where(Request.user_id == order.user_id, Request.idempotency_key.startswith(key))
    async with service.database.reading() as session:
        before = list(await session.scalars(same.order_by(Request.id)))
    if before and before[-1].status not in ENDED:
        to_people.print("This training was begun before: it goes on.")
        return before[-1]
    if before and not again and await _made(service, before[-1]) is not None:
        return before[-1]
    await service.pictures.require_room()
    order = replace(order, idempotency_key=f"{key}:{len(before)}")
    try:
        return await trainings.submit(service.settings, service.database, service.vault, service.folder, order)
    except NotFound as error:
        hint = f"`sitter users add {order.user_id}` makes them; --user says whose the model shall be."
        raise NotFound(error.detail, hint) from error


def _key(order: TrainingOrder) -> str:
    """Tells what is asked for from every other training of the user."""
    asked = (order.name, order.consent_days, order.parameters(), [photo.sha256 for photo in order.chosen.photos])
    return f"cli:{sha256(repr(asked).encode())}"


async def _made(service: Service, job: Request) -> tuple[Model, Version] | None:
    """Returns the version that a job made, and its model; None when there is none that may draw."""
    if job.status != "succeeded":
        return None
    model_id, own = job.parameters["model"], service.registry
    try:
        model = await registry.find(own, caller(), model_id)
        made = [one for one in await registry.versions(own, caller(), model_id) if one.job_id == job.id]
        if not made or model.status == "revoked":
            return None
        await registry.weights_of(own, caller(), model_id, made[0].version)
    except NotFound:
        return None
    return model, made[0]


async def _follow(service: Service, job: Request, told: asyncio.Event) -> Request:
    """Shows how far a job is until it has ended, or the command shall end; returns it as it is then."""
    with progress() as shown:
        bar = shown.add_task("waiting", total=None)
        seen = await history.look(service.database, job)
        while seen.job.status not in ENDED and not told.is_set():
            seen = await history.changed(service.wake, service.database, caller(), seen)
            shown.update(bar, description=_phase(seen), completed=seen.job.step, total=seen.job.step_count or None)
    return seen.job


def _phase(seen: Seen) -> str:
    job = seen.job
    if job.status == "queued":
        return f"waiting, {seen.position - 1} before it" if seen.position and seen.position > 1 else "waiting"
    losses = (job.training or {}).get("losses")
    return f"training, loss {losses[-1][1]:.3f}" if losses and job.phase == "training" else job.phase or "done"


async def _tell(service: Service, job: Request, wishes: _Wishes) -> None:
    """Writes the files of an ended training, and says how good it is and how it draws.

    Raises:
        SitterError: it came to nothing, or a file cannot be written.
    """
    if job.status == "failed":
        raise from_code(job.error_code or "", job.error_detail or "", job.error_hint or "")
    made = await _made(service, job)
    if made is None:
        raise Cancelled("the training was cancelled, or its model erased", "Say the same again to begin anew.")
    model, version = made
    to_people.print(escape(f"{label(model, version.version)} {_scores(version)}"), soft_wrap=True)
    names = sorted(name for name in version.files if name.startswith(SAMPLE))
    files = [await registry.file_of(service.registry, caller(), model.id, version.version, name) for name in names]
    samples = _side_by_side([path.read_bytes() for path, _ in files])
    sheet = wishes.sheet or _free_place(model.name, version.version, samples)
    with written(sheet) as part:
        part.write_bytes(samples)
    to_people.print(escape(f"{sheet}: {len(names)} samples"), soft_wrap=True)
    if wishes.weights is not None:
        kept = await registry.weights_of(service.registry, caller(), model.id, version.version)
        await write_model(kept, wishes.weights)
        what = "its LoRA" if version.kind == "lora" else "the folder of the whole model"
        to_people.print(escape(f"{wishes.weights}: {what}"), soft_wrap=True)
    for line in await _what_now(service, model, version):
        to_people.print(escape(line), soft_wrap=True)


def _scores(version: Version) -> str:
    names = {"likeness": "likeness", "obedience": "obedience", "class_kept": "class kept"}
    scores = [(name, version.scores.get(key)) for key, name in names.items()]
    known = ", ".join(f"{name} {score:.2f}" for name, score in scores if score is not None)
    return f"after {version.parameters['step']} steps{': ' if known else ''}{known}"


async def _what_now(service: Service, model: Model, version: Version) -> list[str]:
    """Returns whether a version draws, what to do if not, and the command that draws with it."""
    whose = "" if model.user_id == model.name else f" --user {model.user_id}"
    draw = f'  sitter generate "photo of {model.token} as an astronaut" --user {model.user_id}'
    picked = await picked_for(service.database, GenerateRequest(prompt="anything", user_id=model.user_id))
    if any(one.model_id == model.id and one.number == version.version for one, _ in picked):
        return ["It is published. Draw with it:", draw]
    draw += f" --model {model.name}"
    if version.published:
        return ["It is published. Draw with it by its name:", draw]
    draw += f" --model-version {version.version}"
    if version.refusal is None:
        return ["Another version is published. Draw with this one by its number:", draw]
    publish = f"  sitter models publish {model.name} {version.version}{whose}"
    told = f"It is not published. {version.refusal}"
    return [told, "Draw with it by its number:", draw, "If it pleases you all the same:", publish]


def _side_by_side(samples: Sequence[bytes]) -> bytes:
    """Returns pictures (PNG) beside each other as one (PNG)."""
    images = [Image.open(io.BytesIO(sample), formats=("PNG",)) for sample in samples]
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _free_place(name: str, version: int, sheet: bytes) -> Path:
    """Returns where a sheet goes that nobody has named a file for: no other picture is replaced by it."""
    file = Path(f"{name}.png")
    taken = file.exists() and not (file.is_file() and file.read_bytes() == sheet)
    return Path(f"{name}-{version}.png") if taken else file
