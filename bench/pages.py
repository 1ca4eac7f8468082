"""What the pages cost: the wire, the browser, and the drawings of everybody while people watch them."""

import asyncio
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import psutil
from playwright.async_api import Page, async_playwright

from bench.figures import Figure, at_most
from bench.served import free_port, served

WATCHERS = 20
ROUNDS = 4
VISITS = 7
DRAWING = {"prompt": "photo of sks person as a knight", "user_id": "ada", "num_inference_steps": 60, "seed": 1}
WATCH_SECONDS = 10.0


def figures() -> Iterator[Figure]:
    """Yields kilobytes of a first load, its first paint, a browser's share of a core, and what watchers cost."""
    yield from asyncio.run(_figures())


async def _figures() -> list[Figure]:
    async with _serving() as client:
        await _draw(client)
        made = [at_most("page_first_load_kb", await _first_load(client) / 1000, "kB", 150)]
        made.append(at_most("page_watchers_slowdown", await _slowdown(client), "ratio", 1.03))
        async with async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = await browser.new_page()
            made.append(at_most("page_first_paint_ms", await _first_paint(page, client), "ms", 300))
            made.append(at_most("page_browser_share", await _browser_share(page, client), "of a core", 0.05))
            await browser.close()
        return made


@asynccontextmanager
async def _serving() -> AsyncIterator[httpx2.AsyncClient]:
    """A server as it comes, in a process of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        places = {"PORT": port, "DATA_DIR": f"{folder}/data", "OUTPUT_DIR": f"{folder}/output", "LOG_LEVEL": "error"}
        async with served(port, "-c", "from api.cli import app; app()", "serve", **places) as client:
            yield client


async def _draw(client: httpx2.AsyncClient) -> float:
    began = time.perf_counter()
    (await client.post("/generate", json=DRAWING)).raise_for_status()
    return time.perf_counter() - began


async def _first_load(client: httpx2.AsyncClient) -> int:
    """Returns the bytes on the wire of a first visit, pictures apart."""
    html = (await client.get("/")).text
    assets = re.findall(r'(?:src|href)="(/static/[^"]+)"', html)
    total = len(html.encode())
    for asset in assets:
        async with client.stream("GET", asset, headers={"Accept-Encoding": "gzip"}) as answer:
            total += sum([len(part) async for part in answer.aiter_raw()])
    return total


async def _slowdown(client: httpx2.AsyncClient) -> float:
    """Returns what a picture takes while WATCHERS pages are open over what it takes while none is, A B B A."""
    ratios = []
    for _ in range(ROUNDS):
        alone = [await _draw(client)]
        watched = [await _watched(client), await _watched(client)]
        alone.append(await _draw(client))
        ratios.append(sum(watched) / sum(alone))
    return statistics.median(ratios)


async def _watched(client: httpx2.AsyncClient) -> float:
    async def read(answer: httpx2.Response) -> None:
        async for _ in answer.aiter_raw():
            pass

    async with AsyncExitStack() as open_:
        streams = [await open_.enter_async_context(client.stream("GET", "/page/live")) for _ in range(WATCHERS)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        spent = await _draw(client)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        return spent


async def _first_paint(page: Page, client: httpx2.AsyncClient) -> float:
    """Returns the milliseconds from asking for the page to its first content, in the median."""
    spent = []
    for _ in range(VISITS):
        await page.goto(str(client.base_url))
        await page.wait_for_timeout(300)
        entries = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        spent.append(float(await page.evaluate(entries)))
    return statistics.median(spent)


async def _browser_share(page: Page, client: httpx2.AsyncClient) -> float:
    """Returns which share of a core the browser takes while it shows one job live."""
    await page.goto(str(client.base_url))
    await client.post("/jobs", json={**DRAWING, "num_inference_steps": 150, "num_images": 4})
    await page.wait_for_selector(".running")
    before = _browser_seconds()
    await asyncio.sleep(WATCH_SECONDS)
    return (_browser_seconds() - before) / WATCH_SECONDS


def _browser_seconds() -> float:
    """Returns the CPU seconds of every process of Chromium that this one started."""
    spent = 0.0
    for child in psutil.Process().children(recursive=True):
        if "chrom" in child.name():
            times = child.cpu_times()
            spent += times.user + times.system
    return spent
