from datetime import timedelta

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.domain.metrics import Metrics, QueueState, queue_state
from api.errors import DatabaseUnavailable, SettingsError
from api.model_service import ModelService
from api.store.database import Database
from api.store.tables import now
from tests.e2e.server import free_port
from tests.jobs import enqueue, taken

TIMINGS = {"queue": 2.0, "load": 0.5, "denoise": 4.0, "decode": 0.2, "encode": 0.1}


def samples(metrics: Metrics, queue: QueueState | None = None) -> dict[str, float]:
    """Every sample of the page: `name{label="value"}` → value."""
    page, _ = metrics.page("", True, queue)
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_counts_answers_by_route_and_status() -> None:
    metrics = Metrics()
    for method, status in (("GET", 200), ("GET", 200), ("GET", 404), ("BREW", 405)):
        metrics.answered(method, "/jobs/{job_id}", status, 0.02)
    page = samples(metrics)
    assert page['sitter_http_requests_total{method="GET",route="/jobs/{job_id}",status="200"}'] == 2
    assert page['sitter_http_requests_total{method="GET",route="/jobs/{job_id}",status="404"}'] == 1
    assert page['sitter_http_requests_total{method="other",route="/jobs/{job_id}",status="405"}'] == 1
    assert page['sitter_http_request_seconds_count{route="/jobs/{job_id}"}'] == 4


def test_counts_the_ends_of_jobs() -> None:
    metrics = Metrics()
    metrics.job_ended("succeeded", timings=TIMINGS, cache_hit=False)
    metrics.job_ended("succeeded", timings=TIMINGS, cache_hit=True)
    metrics.job_ended("failed", code="out_of_memory")
    metrics.job_ended("cancelled")
    page = samples(metrics)
    assert page['sitter_jobs_ended_total{code="",status="succeeded"}'] == 2
    assert page['sitter_jobs_ended_total{code="out_of_memory",status="failed"}'] == 1
    assert page['sitter_jobs_ended_total{code="",status="cancelled"}'] == 1
    assert page['sitter_generation_seconds_sum{phase="denoise"}'] == 8
    assert page['sitter_generation_seconds_count{phase="queue"}'] == 2
    assert (page["sitter_model_load_seconds_count"], page["sitter_model_load_seconds_sum"]) == (1, 0.5)
    assert page['sitter_model_cache_leases_total{result="hit"}'] == 1
    assert page['sitter_model_cache_leases_total{result="miss"}'] == 1


def test_counts_steps_webhooks_and_what_went_wrong() -> None:
    metrics = Metrics()
    metrics.steps(2)
    metrics.steps(3)
    metrics.webhook(sent=True)
    metrics.webhook(sent=False)
    metrics.database_failed()
    metrics.lease_lapsed(2)
    page = samples(metrics)
    assert page["sitter_steps_total"] == 5
    assert page['sitter_webhooks_total{result="sent"}'] == page['sitter_webhooks_total{result="failed"}'] == 1
    assert page["sitter_database_errors_total"] == 1
    assert page["sitter_leases_lapsed_total"] == 2


def test_two_processes_in_one_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.steps(1)
    assert samples(other)["sitter_steps_total"] == 0


def test_speaks_openmetrics_to_whom_wants_it() -> None:
    page, media_type = Metrics().page("application/openmetrics-text; version=1.0.0", False, None)
    assert media_type.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    assert b"sitter_ready 0.0" in page


def test_a_worker_serves_them_on_a_port_of_its_own() -> None:
    metrics, port = Metrics(), free_port()
    metrics.steps(4)
    with metrics.served(port):
        page = httpx2.get(f"http://127.0.0.1:{port}/metrics")
        with pytest.raises(SettingsError, match=str(port)), Metrics().served(port):
            pass
    assert page.headers["Content-Type"].startswith("text/plain")
    assert "sitter_steps_total 4.0" in page.text
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics")


@pytest.mark.anyio
async def test_the_queue_is_told_as_it_stands(database: Database) -> None:
    assert await queue_state(database) == QueueState(0, 0, 0.0)
    await enqueue(database, "ada", start_tag=0, created_at=now() - timedelta(hours=3))
    await enqueue(database, "ada", start_tag=1, created_at=now() - timedelta(minutes=10))
    await enqueue(database, "bo", start_tag=2, created_at=now() - timedelta(minutes=5))
    await taken(database)
    state = await queue_state(database)
    assert state is not None
    assert (state.queued, state.running) == (2, 1)
    assert 600 <= state.head_age_seconds < 660
    page = samples(Metrics(), state)
    assert page['sitter_queue_jobs{state="queued"}'] == 2
    assert page['sitter_queue_jobs{state="running"}'] == 1
    assert page["sitter_queue_head_age_seconds"] == state.head_age_seconds


@pytest.mark.anyio
async def test_a_database_that_is_away_is_counted_and_left_out() -> None:
    metrics = Metrics()
    database = Database(f"postgresql://sitter@127.0.0.1:{free_port()}/sitter", metrics.database_failed)
    assert await queue_state(database) is None
    page = samples(metrics)
    assert page["sitter_database_errors_total"] == 1
    assert page["sitter_ready"] == 1
    assert not [name for name in page if name.startswith("sitter_queue")]
    with pytest.raises(DatabaseUnavailable):
        async with database.transaction():
            pass
    assert samples(metrics)["sitter_database_errors_total"] == 2
    await database.close()


def test_the_models_in_memory_are_told(models: ModelService) -> None:
    metrics = Metrics()
    metrics.watch(models)
    assert models.engine.device == "cpu"  # it has started
    models.clear_cache()
    page = samples(metrics)
    assert page["sitter_model_cache_models"] == 0
    assert page['sitter_model_cache_bytes{device="cpu"}'] == 0
    with models.lease(models._settings.source_for("default")):
        page = samples(metrics)
        assert page["sitter_model_cache_models"] == 1
        assert page['sitter_model_cache_bytes{device="cpu"}'] == models.cache.used("cpu") > 0
        assert page['sitter_model_cache_budget_bytes{device="cpu"}'] == models.cache.budgets["cpu"]
