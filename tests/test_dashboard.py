"""The Grafana dashboard and the metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from api.domain.metrics import PHASES, Metrics, QueueState
from api.model_service import ModelService
from tests import builders

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parent.parent / "deploy" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS += [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
METRIC = re.compile(r"\b(?:sitter|process)_\w+")
SELECTOR = re.compile(r"\b((?:sitter|process)_\w+)\{([^}]*)\}")
ADDED_BY_PROMETHEUS = {"instance", "job"}


def exposed() -> dict[str, dict[str, set[str]]]:
    """Sample name → label → its values, of a process that has counted one of everything."""
    metrics = Metrics()
    metrics.answered("GET", "/health", 200, 0.1)
    metrics.job_ended("succeeded", timings=dict.fromkeys(PHASES, 1.0), cache_hit=True)
    metrics.job_ended("failed", code="out_of_memory")
    models = ModelService(builders.settings({"default": builders.source("/nowhere")}))
    assert models.engine
    metrics.watch(models)
    page, _ = metrics.page("", True, QueueState(1, 1, 1.0))
    models.close()
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            for label, value in {"": "", **sample.labels}.items():
                found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
    return found


def test_every_metric_label_and_value_of_the_dashboard_is_there() -> None:
    there = exposed()
    for expression in EXPRESSIONS:
        assert METRIC.findall(expression), expression
        for name in METRIC.findall(expression):
            assert name in there, f"{name} in {expression}"
        for name, matchers in SELECTOR.findall(expression):
            for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
                if label not in ADDED_BY_PROMETHEUS:
                    values = value.split("|") if operator == "=~" else [value]
                    assert set(values) <= there[name][label], f"{label} in {expression}"
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        labels = {label.strip() for group in grouped for label in group.split(",")} - ADDED_BY_PROMETHEUS
        assert labels <= set().union(*(there[name] for name in METRIC.findall(expression))), expression


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    """But those that build others: a histogram's sum and count, and when a counter began."""
    shown = {name.removesuffix("_bucket") for expression in EXPRESSIONS for name in METRIC.findall(expression)}
    ours = {name for name in exposed() if name.startswith("sitter_") and not re.search("_(sum|count|created)$", name)}
    assert {name.removesuffix("_bucket") for name in ours} == {name for name in shown if name.startswith("sitter_")}


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
