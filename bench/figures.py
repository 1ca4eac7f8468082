"""A measured figure, how two ways are timed against each other, and the page that keeps the results."""

import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import structlog

LIBRARIES = ("torch", "diffusers", "transformers", "fastapi")


@dataclass(frozen=True)
class Figure:
    """One result. `bar` says what it should be, where there is a bar, and `met` whether it is."""

    name: str
    value: float
    unit: str
    bar: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {self.unit}"


def quiet() -> None:
    """Has the log of this process say warnings alone."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def at_most(name: str, value: float, unit: str, limit: float) -> Figure:
    """Returns a figure whose bar is an upper limit."""
    return Figure(name, value, unit, f"≤ {limit:g}", value <= limit)


def at_least(name: str, value: float, unit: str, limit: float) -> Figure:
    """Returns a figure whose bar is a lower limit."""
    return Figure(name, value, unit, f"≥ {limit:g}", value >= limit)


def seconds(action: Callable[[], object]) -> float:
    """Returns how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def paired(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Returns the median seconds of each and the median ratio second / first.

    Runs them A B B A within each round after one warm-up, so that a drift of the machine meets both alike.
    """
    first()
    second()
    firsts, seconds_, ratios = [], [], []
    for _ in range(rounds):
        a = [seconds(first)]
        b = [seconds(second), seconds(second)]
        a.append(seconds(first))
        firsts += a
        seconds_ += b
        ratios.append(sum(b) / sum(a))
    return statistics.median(firsts), statistics.median(seconds_), statistics.median(ratios)


def machine() -> str:
    """Returns the processor, cores and memory of this machine in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores, {platform.system()}"


def page(sections: dict[str, list[Figure]], path: Path, command: str = "make bench", remarks: str = "") -> None:
    """Writes the results of `command` to `path` as Markdown, with machine, versions and date, and remarks below."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Benchmarks",
        "",
        f"Measured {date.today().isoformat()} by `{command}` on {machine()};",
        f"Python {platform.python_version()}, {libraries}.",
        "Medians of interleaved runs; the machine is shared, so trust ratios more than seconds.",
    ]
    for title, figures in sections.items():
        lines += ["", f"## {title}", "", "| figure | value | unit | bar | met |", "|---|---|---|---|---|"]
        for figure in figures:
            met = {None: "", True: "yes", False: "**no**"}[figure.met]
            lines.append(f"| {figure.name} | {figure.value:.4g} | {figure.unit} | {figure.bar} | {met} |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + (f"\n{remarks}" if remarks else ""))
