"""`sitter delta`: lets a fine-tuned checkpoint ride in one step with other users' models, as what it changed."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from api.cli_people import errors_for_people, to_people
from api.config import ModelSource, load_settings, locate
from api.errors import InvalidRequest
from api.model_service import ModelService
from api.wiring import open_models

if TYPE_CHECKING:
    from PIL.Image import Image


def make_delta(
    user: Annotated[str, typer.Argument(metavar="USER", help="Whose checkpoint.")],
    base: Annotated[str, typer.Option(help="The model that it was trained from, as in USER_MODELS.")],
    rank: Annotated[int, typer.Option(min=1, max=128, help="Of the factors: more is closer, larger and slower.")] = 32,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File [DATA_DIR/deltas/USER.safetensors].")
    ] = None,
) -> None:
    """Make a delta of a user's checkpoint, and draw with both to see whether it may stand for it.

    Whole checkpoints cannot share a step with other users' models, and each takes all of a model's memory. A delta
    keeps what the checkpoint changed in its base, in factors of low rank: it shares the base, and steps with others.
    """
    with errors_for_people():
        settings = load_settings(log_level="error", dtype="float32")
        source = settings.source_for(user).itself()
        if source.lora is not None:
            raise InvalidRequest(f"{user} has a LoRA, which shares steps as it is", "Only whole models need a delta.")
        file = locate(output or settings.data_dir / "deltas" / f"{user}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_models(settings) as models:
            passed = _make(models, source, ModelSource(base=base), rank, file)
    if not passed:
        to_people.print("[yellow]It may not stand for the checkpoint[/], which is drawn as it is. Try a higher --rank.")
        raise typer.Exit(1)
    to_people.print(
        f"{escape(str(file))} may stand for it. In USER_MODELS:\n"
        f"  {user}: {{base: {escape(source.base)}, delta: {escape(str(file))}}}"
    )


def _make(models: ModelService, source: ModelSource, base: ModelSource, rank: int, file: Path) -> bool:
    """Writes the delta with the gate's verdict, and returns that."""
    found = models.engine.find_base(source)  # and torch is there: two threads that import it trip over each other
    from api.engine import deltas

    with models.lease(source) as checkpoint, models.lease(base) as leased:
        to_people.print("Extracting …")
        tensors = deltas.extract(leased.base.pipeline, checkpoint.base.pipeline, rank)
    mark = deltas.fingerprint(found)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        tried = Path(folder) / file.name
        deltas.write_delta(tried, tensors, deltas.Delta(base.base, mark, rank, ()))
        to_people.print(f"Drawing {len(deltas.GATE)} pictures with each …")
        drawn = [_pictures(models, each) for each in (ModelSource(base=base.base, lora=str(tried)), source)]
        delta = deltas.Delta(base.base, mark, rank, deltas.psnr(*drawn))
        deltas.write_delta(tried, tensors, delta)
        tried.replace(file)
    told = ", ".join(f"{each:.1f}" for each in delta.psnr)
    to_people.print(f"rank {rank}, {file.stat().st_size / 1e6:.1f} MB: {told} dB; {deltas.LEAST_PSNR:g} are asked for.")
    return delta.passed


def _pictures(models: ModelService, source: ModelSource) -> "Sequence[Image]":
    from api.engine.deltas import GATE

    with models.lease(source) as model:
        return [
            models.engine.draw(model.base, model.adapter, request, request.seed or 0, lambda step: None).images[0]
            for request in GATE
        ]
