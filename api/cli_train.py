"""`sitter train`: a model of somebody's own from a folder of pictures, without a server."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image
from rich.markup import escape

from api.cli_people import entry_of, errors_for_people, progress, to_people
from api.config import DEFAULT_USER, USER_ID, ModelSource, Settings, load_settings
from api.domain.photos import MOST_BYTES, Photo, Verdict, examine
from api.engine.lesson import Lesson
from api.errors import Forbidden, InvalidRequest, StorageUnavailable
from api.whole import write_whole
from api.wiring import open_models

if TYPE_CHECKING:
    from api.engine.dreambooth import Report, Trained

LEAST, MOST = 3, 20  # photos


def train_sitter(
    pictures: Annotated[Path, typer.Argument(help=f"Folder with {LEAST} to {MOST} pictures of one person.")],
    name: Annotated[str, typer.Option(help="What the model shall be called.")],
    class_noun: Annotated[str, typer.Option("--class", help="What they are: person, dog…")] = "person",
    consent: Annotated[bool, typer.Option("--consent", help="Whoever is in the pictures agrees to it.")] = False,
    base: Annotated[str | None, typer.Option(help="The model to train over [that of `default`].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Of training [the base's own].")] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=128, help="Of the factors [16].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed trains the same model.")] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Learn from mirror images, too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File [DATA_DIR/loras/NAME.safetensors].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model of that name.")] = False,
) -> None:
    """Train a model of somebody from a few pictures, and draw them.

    The answer to `sks` and the class noun is then whoever is in the pictures: "photo of sks person as a knight".
    """
    with errors_for_people():
        if not consent:
            raise Forbidden("nobody is learned without their consent", "Ask them, and say --consent.")
        settings = load_settings(log_level="error")
        if not re.fullmatch(USER_ID, name):
            raise InvalidRequest(f"{name} cannot be a model's name", "Letters, digits and . _ @ - will do.")
        file = output.absolute() if output else settings.data_dir / "loras" / f"{name}.safetensors"
        if file.suffix != ".safetensors" or file.is_dir():
            raise InvalidRequest(f"{file} cannot be a model's file", "Let it end with .safetensors.")
        if not force and (there := [one for one in (file, file.with_suffix(".png")) if one.exists()]):
            raise InvalidRequest(f"{there[0]} is there already", "Choose another name, or say --force.")
        over = ModelSource(base=base) if base else settings.source_for(DEFAULT_USER).without_lora().itself()
        photos = [photo.png for photo in _examined(pictures)]
        lesson = Lesson(photos, class_noun, steps=steps, rank=rank, seed=seed, flip=flip)
        work = settings.data_dir / "trainings" / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(parents=True, exist_ok=True)
            told = _train(settings, over, lesson, work, file)
        except OSError as error:
            raise StorageUnavailable(f"the model cannot be kept: {error.strerror}") from error
    entry = entry_of(name, over.model_copy(update={"lora": str(file)}))
    to_people.print(f"{escape(told)}In USER_MODELS:\n  {entry}", soft_wrap=True)


def _examined(folder: Path) -> list[Photo]:
    """Returns the good photos of a folder, and says of each other file why it is none."""
    if not folder.is_dir():
        raise InvalidRequest(f"there is no folder {folder}", "Say where the pictures are.")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    good = list[Photo]()
    verdicts = examine(file.read_bytes() for file in files if file.stat().st_size <= MOST_BYTES)
    for file in files:
        verdict = next(verdicts) if file.stat().st_size <= MOST_BYTES else Verdict(None, "it is too large")
        if verdict.photo and len(good) < MOST:
            good.append(verdict.photo)
        else:
            to_people.print(f"  {escape(file.name)}: {verdict.reason or f'{MOST} pictures are enough'}")
    if len(good) < LEAST:
        raise InvalidRequest(f"{len(good)} pictures are good, {LEAST} are the least", "Add clear, different ones.")
    return good


def _train(settings: Settings, over: ModelSource, lesson: Lesson, work: Path, file: Path) -> str:
    """Trains, keeps the best candidate as `file` and its samples beside it, and says how good it is.

    What is in `work` is gone on from; it is removed at the end.
    """
    with open_models(settings) as models, progress() as shown:
        bar = shown.add_task("caching", total=None)

        def show(report: "Report") -> None:
            loss = f", loss {report.loss:.3f}" if report.loss is not None else ""
            shown.update(bar, description=f"{report.phase}{loss}", completed=report.done, total=report.of or None)

        trained = models.train(over, lesson, work, show)
    write_whole(file, trained.file.read_bytes(), mode=0o644, prefix=".")
    sheet = file.with_suffix(".png")
    _sheet(trained.samples).save(sheet)
    shutil.rmtree(work)
    return f"{file}: {_told(trained)}\n{sheet}: {len(trained.samples)} samples\n"


def _told(trained: "Trained") -> str:
    scores = trained.scores
    known = {"likeness": scores.likeness, "obedience": scores.obedience, "class kept": scores.class_kept}
    told = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
    refusal = scores.refusal()
    return f"after {trained.step} steps{', ' if told else ''}{told}." + (f" {refusal}" if refusal else "")


def _sheet(samples: Sequence[Image.Image]) -> Image.Image:
    """Returns the samples beside each other."""
    sheet = Image.new("RGB", (sum(one.width for one in samples), samples[0].height))
    left = 0
    for one in samples:
        sheet.paste(one, (left, 0))
        left += one.width
    return sheet
