"""`sitter delta`: lets a fine-tuned checkpoint share steps with others of its base, as what it changed in that."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from api.cli_people import entry_of, errors_for_people, to_people
from api.config import ModelSource, load_settings, locate
from api.errors import InvalidRequest
from api.model_service import ModelService
from api.schemas import GenerateRequest
from api.wiring import open_models

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "photo of sks person",
    "sks person as a futuristic astronaut",
    "a lighthouse in a storm",
    "sks person as a knight",
)
STEPS = 30


def make_delta(
    user: Annotated[str, typer.Argument(metavar="USER", help="Whose checkpoint.")],
    base: Annotated[str, typer.Option(help="The model that it was trained from, as in USER_MODELS.")],
    rank: Annotated[int, typer.Option(min=1, max=128, help="Of the factors: more is closer, larger and slower.")] = 32,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw with both; say what it was trained on \\[of `sks person`].")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File [DATA_DIR/deltas/USER.safetensors].")
    ] = None,
) -> None:
    """Make a delta of a user's checkpoint, and draw with both to see whether it may stand for it.

    Whole checkpoints share no step with other models, and each takes all of a model's memory. A delta keeps what the
    checkpoint changed in its base, in factors of low rank: it shares the base, and steps with other deltas over it.
    """
    with errors_for_people():
        settings = load_settings(log_level="error", dtype="float32", compile=False)
        if user not in settings.user_models:
            raise InvalidRequest(f"{user} has no model", "USER_MODELS has those who do.")
        source = settings.source_for(user).itself()
        if source.lora is not None:
            raise InvalidRequest(f"{user} has a LoRA, which shares steps as it is", "Only whole models need a delta.")
        file = locate(output or settings.data_dir / "deltas" / f"{user}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        gate = [_drawing(each, seed) for seed, each in enumerate(prompt or PROMPTS)]
        with open_models(settings) as models:
            passed = _make(models, source, ModelSource(base=base), rank, gate, file)
    if not passed:
        to_people.print("[yellow]It may not stand for the checkpoint[/], and was not kept. Try a higher --rank.")
        raise typer.Exit(1)
    entry = entry_of(user, source.model_copy(update={"delta": str(file)}))
    to_people.print(f"It may stand for the checkpoint. In USER_MODELS:\n  {entry}", soft_wrap=True)


def _drawing(prompt: str, seed: int) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, num_inference_steps=STEPS, seed=seed)


def _make(
    models: ModelService, source: ModelSource, base: ModelSource, rank: int, gate: list[GenerateRequest], file: Path
) -> bool:
    """Writes the delta if the gate lets it pass, and returns whether it did."""
    found = [models.engine.find_base(each) for each in (base, source)]
    from api.engine import deltas  # now that torch is there: two threads that import it trip over each other

    for each in found:
        deltas.check_kind(each)
    with models.lease(source) as checkpoint, models.lease(base) as leased:
        to_people.print("Extracting …")
        made = deltas.extract(leased.base.pipeline, checkpoint.base.pipeline, rank)
    if made.left_out:
        to_people.print(f"Left out, as no LoRA can change them: {escape(', '.join(made.left_out))}")
    base_mark, mark = map(deltas.fingerprint, found)
    untried = deltas.Delta(base.base, base_mark, mark, rank, ())
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        tried = Path(folder) / file.name
        deltas.write_delta(tried, made.tensors, untried)
        to_people.print(f"Drawing {len(gate)} pictures with each …")
        drawn = [_pictures(models, each, gate) for each in (ModelSource(base=base.base, lora=str(tried)), source)]
        delta = replace(untried, psnr=deltas.psnr(*drawn))
        told = ", ".join(f"{each:.1f}" for each in delta.psnr)
        size = tried.stat().st_size / 1e6
        to_people.print(f"rank {rank}, {size:.1f} MB: {told} dB; {deltas.LEAST_PSNR:g} are asked for.")
        if delta.passed:
            deltas.write_delta(tried, made.tensors, delta)
            tried.replace(file)
    return delta.passed


def _pictures(models: ModelService, source: ModelSource, gate: list[GenerateRequest]) -> "Sequence[Image]":
    with models.lease(source) as model:
        return [models.engine.draw(model, request, request.seed or 0, lambda step: None).images[0] for request in gate]
