"""`sitter`: serve, generate, worker, cache, doctor, and rooms of its own for models, users, keys, audit and db."""

import asyncio
import os
import platform
import time
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import httpx2
import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from api import __version__, cli_delta, cli_models, cli_train, cli_users, cli_vault, serving
from api.cli_models import drawn_with
from api.cli_people import console, errors_for_people, progress, to_people, told_to_end
from api.config import DEFAULT_USER, Settings, load_settings
from api.domain.accounts import check_host
from api.errors import SitterError, StorageUnavailable
from api.model_service import ModelService
from api.schemas import CacheResponse, GenerateRequest, resolved
from api.store.files import PictureFolder
from api.wiring import migrate_database, open_models, open_service, working

app = typer.Typer(
    help="Draws people from their own fine-tuned models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
database = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(database, name="db")
app.add_typer(cli_models.models, name="models")
app.add_typer(cli_users.users, name="users")
app.add_typer(cli_users.keys, name="keys")
app.add_typer(cli_users.audit, name="audit")
app.add_typer(cli_vault.vault, name="vault")
app.command("delta")(cli_delta.make_delta)
app.command("train")(cli_train.train_sitter)

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "fastapi")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [HOST, 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on [PORT, 8000].")] = None,
) -> None:
    """Start the HTTP server."""
    # The application reads its settings by itself, also under `uvicorn main:app`: options reach it as they do there.
    os.environ.update({name: str(value) for name, value in {"HOST": host, "PORT": port}.items() if value is not None})
    with errors_for_people():
        settings = load_settings()
        check_host(settings)
        PictureFolder(settings.output_dir).check()
        serving.serve(settings)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; `sks person` is the user.")],
    user: Annotated[str, typer.Option(help="Whose model draws.")] = DEFAULT_USER,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the PNG goes.")] = Path("picture.png"),
    steps: Annotated[int | None, typer.Option(help="Denoising steps [30].")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow the prompt [7.5].")] = None,
    width: Annotated[int, typer.Option(help="Pixels.")] = 512,
    height: Annotated[int, typer.Option(help="Pixels.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same picture.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, euler_a, dpmpp_2m, unipc or lcm.")] = None,
    preset: Annotated[str | None, typer.Option(help="fast: in few steps, where the model can.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Which of the user's own models (the one published last, else USER_MODELS').")
    ] = None,
    model_version: Annotated[int | None, typer.Option(help="Which version of it (the published one).")] = None,
) -> None:
    """Draw a picture without a server."""
    with errors_for_people():
        said = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "scheduler": scheduler,
            "preset": preset,
            "model": model,
            "model_version": model_version,
        }
        said = {name: value for name, value in said.items() if value is not None}
        request = GenerateRequest.model_validate(
            {"prompt": prompt, "user_id": user, "width": width, "height": height, **said}
        )
        if not output.absolute().parent.is_dir():
            raise StorageUnavailable(
                f"there is no folder {output.parent} for the picture", "Make it, or choose another -o."
            )
        settings = load_settings(log_level="warning")
        source, own = drawn_with(settings, request)
        request = resolved(request, source, settings)
        with open_models(settings) as models, progress() as shown:
            bar = shown.add_task("loading", total=request.num_inference_steps)
            generation = models.generate(
                request,
                lambda step: shown.update(bar, description="drawing", completed=step.done, total=step.of),
                own=own,
            )
        output.write_bytes(generation.pngs[0])
        for warning in generation.warnings:
            to_people.print(escape(warning))
        if not own and model is None and user not in settings.user_models:
            to_people.print(f"{user} has no model that draws: the default's drew.")
        to_people.print(f"{output}: {generation.model_id}, seed {generation.seeds[0]}")


@app.command()
def worker(
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Jobs in hand at once.")] = 8,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of 127.0.0.1 where Prometheus reads what it counts.")
    ] = None,
) -> None:
    """Draw the jobs of the database, beside a server started with WORKERS=0 or on another machine."""
    with errors_for_people():
        settings = load_settings()
        asyncio.run(_work(settings, jobs, metrics_port))
    to_people.print("Stopped.")


async def _work(settings: Settings, jobs: int, metrics_port: int | None) -> None:
    told = told_to_end()  # first: a signal may come while the database is brought up to date
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(open_service(settings))
        if metrics_port is not None:
            stack.enter_context(service.metrics.served(metrics_port))
        await stack.enter_async_context(working(service, jobs))
        to_people.print(f"Drawing up to {jobs} jobs at once. Ctrl-C ends it once they are done.")
        await told.wait()  # leaving `working` takes no more jobs from then on


@database.command("upgrade")
def upgrade_database() -> None:
    """Bring the database to this version's tables; `serve` and `worker` do so by themselves."""
    with errors_for_people():
        settings = load_settings()
        migrate_database(settings)
    to_people.print("The database is up to date.")


@app.command("cache")
def show_cache(
    address: Annotated[str | None, typer.Option(help="The running server (http://HOST:PORT).")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="KEY", help="With AUTH=required: an administrator's API key.")
    ] = None,
) -> None:
    """Show which models the running server holds in memory."""
    with errors_for_people():
        settings = load_settings()
        url = address or serving.url(settings.host, settings.port)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            got = httpx2.get(f"{url}/cache", headers=headers, timeout=10)
            if got.status_code in {401, 403}:
                to_people.print("This server asks for an administrator's API key: --key, made by `sitter keys add`.")
                raise typer.Exit(1)
            answer = CacheResponse.model_validate_json(got.raise_for_status().content)
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
    with errors_for_people():
        settings = load_settings(log_level="error")
        with open_models(settings) as models:
            engine = models.engine
            console.print(f"Sitter {__version__}, Python {platform.python_version()}, {platform.platform()}")
            console.print(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
            console.print(f"device {engine.device}, {engine.dtype}, {engine.threads} CPU threads")
            for device, budget in models.cache.budgets.items():
                free = engine.free_bytes(device)
                console.print(f"memory for models on {device}: {budget / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
            failed = _try_output(settings, PictureFolder(settings.output_dir)) + _try_models(settings, models)
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
            if source.delta is not None:
                service.engine.delta_over(source)
            with service.lease(source.itself()):
                took = time.perf_counter() - began
        except SitterError as error:
            failed += 1
            console.print(f"  [red]fails[/]  {user}: {escape(error.detail)}\n         {escape(error.hint)}")
        else:
            console.print(f"  [green]loads[/]  {user}: {source.model_id} in {took:.1f} s")
    return failed
