"""`sitter train`: a model of somebody's own from a folder of pictures, without a server."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.cli_people import errors_for_people, to_people
from api.config import DEFAULT_USER, ModelSource, Settings, load_settings, locate
from api.domain.photos import Photo, examine
from api.errors import Forbidden, InvalidRequest
from api.wiring import open_models

if TYPE_CHECKING:
    from api.engine.dreambooth import Report, Trained

LEAST, MOST = 3, 20  # photos
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


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
) -> None:
    """Train a model of somebody from a few pictures, and draw them.

    The answer to `sks` and the class noun is then whoever is in the pictures: "photo of sks person as a knight".
    """
    with errors_for_people():
        if not consent:
            raise Forbidden("nobody is learned without their consent", "Ask them, and say --consent.")
        settings = load_settings(log_level="error")
        source = ModelSource(base=base) if base else settings.source_for(DEFAULT_USER).without_lora()
        photos = _examined(pictures)
        file = locate(output or settings.data_dir / "loras" / f"{name}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        trained = _train(settings, source, photos, class_noun, steps, rank, seed, flip, file)
    entry = {"base": source.base, "lora": str(file)}
    said = ", ".join(f"{key}: {value}" for key, value in entry.items())
    to_people.print(f"{escape(trained)}In USER_MODELS:\n  {escape(name)}: {{{escape(said)}}}", soft_wrap=True)


def _examined(folder: Path) -> list[Photo]:
    """Returns the good photos of a folder, and says of each other one why it is none."""
    if not folder.is_dir():
        raise InvalidRequest(f"there is no folder {folder}", "Say where the pictures are.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)[:MOST]
    verdicts = examine([file.read_bytes() for file in files])
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.reason:
            to_people.print(f"  {escape(file.name)}: {verdict.reason}")
    good = [verdict.photo for verdict in verdicts if verdict.photo]
    if len(good) < LEAST:
        raise InvalidRequest(f"{len(good)} pictures are good, {LEAST} are the least", "Add clear, different ones.")
    return good


def _train(
    settings: Settings,
    source: ModelSource,
    photos: Sequence[Photo],
    noun: str,
    steps: int | None,
    rank: int | None,
    seed: int,
    flip: bool,
    file: Path,
) -> str:
    """Trains, keeps the best candidate as `file` and its samples beside it, and says how good it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        open_models(settings) as models,
        tempfile.TemporaryDirectory(dir=file.parent) as folder,
        Progress(*columns, console=to_people, transient=True) as progress,
    ):
        _ = models.engine  # torch is there from here on: two threads that import it trip over each other
        from api.engine.dreambooth import Lesson

        bar = progress.add_task("caching", total=None)

        def show(report: "Report") -> None:
            loss = f", loss {report.loss:.3f}" if report.loss is not None else ""
            progress.update(bar, description=f"{report.phase}{loss}", completed=report.done, total=report.of or None)

        lesson = Lesson([photo.png for photo in photos], noun, steps=steps, rank=rank, seed=seed, flip=flip)
        trained = models.train(source, lesson, Path(folder), show)
        sheet = file.with_suffix(".png")
        _sheet(trained.samples).save(sheet)
        trained.file.replace(file)
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
