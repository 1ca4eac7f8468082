"""`sitter`: serve, generate, models, doctor."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, cast

import httpx2
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from api import __version__, serving
from api.config import DEFAULT_USER, Settings, load_settings
from api.errors import SettingsError, SitterError, StorageUnavailable
from api.model_service import ModelService
from api.schemas import CacheResponse, GenerateRequest, Scheduler
from api.store.files import PictureFolder
from api.wiring import open_service

app = typer.Typer(
    help="Draws people from their own fine-tuned models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
to_people = Console(stderr=True, highlight=False)

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "fastapi")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [HOST, 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on [PORT, 8000].")] = None,
) -> None:
    """Start the HTTP server."""
    # The application reads its settings by itself, also under `uvicorn main:app`: options reach it as they do there.
    os.environ.update({name: str(value) for name, value in {"HOST": host, "PORT": port}.items() if value is not None})
    with _errors_for_people():
        settings = load_settings()
        PictureFolder(settings.output_dir).check()
        serving.serve(settings)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; `sks person` is the user.")],
    user: Annotated[str, typer.Option(help="Whose model draws.")] = DEFAULT_USER,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the PNG goes.")] = Path("picture.png"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="How strictly to follow the prompt.")] = 7.5,
    width: Annotated[int, typer.Option(help="Pixels.")] = 512,
    height: Annotated[int, typer.Option(help="Pixels.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same picture.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, euler_a, dpmpp_2m or unipc.")] = None,
) -> None:
    """Draw a picture without a server."""
    with _errors_for_people():
        request = GenerateRequest(
            prompt=prompt,
            user_id=user,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            seed=seed,
            negative_prompt=negative_prompt,
            scheduler=cast(Scheduler | None, scheduler),
        )
        if not output.absolute().parent.is_dir():
            raise StorageUnavailable(
                f"there is no folder {output.parent} for the picture", "Make it, or choose another -o."
            )
        settings = load_settings(log_level="warning")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            open_service(settings) as service,
            Progress(*columns, console=to_people, transient=True) as progress,
        ):
            bar = progress.add_task("loading", total=steps)
            generation = service.models.generate(
                request,
                lambda done, of: progress.update(bar, description="drawing", completed=done, total=of),
            )
        output.write_bytes(generation.pngs[0])
        for warning in generation.warnings:
            to_people.print(escape(warning))
        to_people.print(f"{output}: {generation.model_id}, seed {generation.seeds[0]}")


@app.command()
def models(
    address: Annotated[str | None, typer.Option(help="The running server [http://HOST:PORT].")] = None,
) -> None:
    """Show which models the running server holds in memory."""
    with _errors_for_people():
        settings = load_settings()
        url = address or serving.url(settings.host, settings.port)
        try:
            answer = CacheResponse.model_validate_json(
                httpx2.get(f"{url}/cache", timeout=10).raise_for_status().content
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, ValidationError) as error:
            to_people.print(f"No Sitter answers at {url}.\nStart it with `sitter serve`, or say --address.")
            raise typer.Exit(1) from error
    table = Table("model", "bytes", "of its own", "in use", "hits")
    for model in answer.models:
        table.add_row(model.model_id, f"{model.bytes:,}", f"{model.own_bytes:,}", str(model.in_use), str(model.hits))
    console.print(table)
    for device, used in answer.used_bytes.items():
        console.print(f"{device}: {used:,} of {answer.budget_bytes[device]:,} bytes")


@app.command()
def doctor() -> None:
    """Say what this machine can do, and which models load, and why not."""
    with _errors_for_people():
        settings = load_settings(log_level="error")
        with open_service(settings) as service:
            engine = service.models.engine
            console.print(f"Sitter {__version__}, Python {platform.python_version()}, {platform.platform()}")
            console.print(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
            console.print(f"device {engine.device}, {engine.dtype}, {engine.threads} CPU threads")
            for device, budget in service.models.cache.budgets.items():
                free = engine.free_bytes(device)
                console.print(f"memory for models on {device}: {budget / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
            failed = _try_output(settings, service.pictures) + _try_models(settings, service.models)
    raise typer.Exit(1 if failed else 0)


def _try_output(settings: Settings, pictures: PictureFolder) -> int:
    """Says where pictures are kept, and returns 1 when they cannot be."""
    try:
        pictures.check()
    except StorageUnavailable as error:
        console.print(f"[red]{escape(error.detail)}[/]\n{escape(error.hint)}")
        return 1
    console.print(f"pictures are kept in {escape(str(settings.output_dir))}")
    return 0


def _try_models(settings: Settings, service: ModelService) -> int:
    """Loads every user's model in turn, says how it went, and returns how many failed."""
    failed = 0
    for user, source in settings.user_models.items():
        began = time.perf_counter()
        if source.hub_id and not service.engine.is_downloaded(source):
            console.print(f"  [yellow]later[/]  {user}: {source.base} is downloaded from the hub at its first use")
            continue
        try:
            with service.lease(source):
                took = time.perf_counter() - began
        except SitterError as error:
            failed += 1
            console.print(f"  [red]fails[/]  {user}: {escape(error.detail)}\n         {escape(error.hint)}")
        else:
            console.print(f"  [green]loads[/]  {user}: {source.model_id} in {took:.1f} s")
    return failed


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Ends the command with a sentence and a hint instead of a traceback."""
    try:
        yield
    except SitterError as error:
        to_people.print(f"{escape(error.detail)}\n{escape(error.hint)}")
        raise typer.Exit(1) from error
    except SettingsError as error:
        to_people.print(f"{escape(str(error))}\nThe README lists every setting.")
        raise typer.Exit(2) from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        to_people.print(escape(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
        raise typer.Exit(2) from error
