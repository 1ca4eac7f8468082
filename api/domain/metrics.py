"""What is counted for Prometheus. Labels name routes, phases, codes and devices: never a prompt, a user or a key."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import func, select, text

from api import __version__
from api.domain.jobs import QUEUED
from api.errors import DatabaseUnavailable, SettingsError
from api.model_service import ModelService
from api.schemas import Timings
from api.store.database import Database
from api.store.tables import Request, Status, now

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
PHASES = tuple(Timings.model_fields)
SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
ANSWER_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The counters of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"sitter_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str, labels: Iterable[str], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"sitter_{name}", help, labels, buckets=buckets, registry=self.registry)

        ProcessCollector(registry=self.registry)
        Info("sitter_build", "What runs.", registry=self.registry).info({"version": __version__})
        self._requests = counter("http_requests", "Answers, by route and status.", ("method", "route", "status"))
        self._answer = histogram("http_request_seconds", "From a request to its answer.", ("route",), ANSWER_SECONDS)
        self._ended = counter("jobs_ended", "Jobs that ended here, by end and error code.", ("status", "code"))
        self._steps = counter("steps", "Denoising steps done here, counted for each picture.")
        self._leases = counter("model_cache_leases", "Models taken from memory (hit) or loaded (miss).", ("result",))
        self._load = histogram("model_load_seconds", "Loading a model.", (), SECONDS)
        self._phases = histogram("generation_seconds", "Phases of the jobs that succeeded here.", ("phase",), SECONDS)
        self._webhooks = counter("webhooks", "Tries to deliver a webhook.", ("result",))
        self._database_errors = counter("database_errors", "Times that the database did not answer.")
        self._lapsed = counter("leases_lapsed", "Jobs taken back from workers that died or were cut off.")
        for phase in PHASES:
            self._phases.labels(phase)
        for label in ("hit", "miss"):
            self._leases.labels(label)
        for label in ("sent", "failed"):
            self._webhooks.labels(label)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answer; `route` is the route's template, never the path that was asked for."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._answer.labels(route).observe(seconds)

    def job_ended(
        self,
        status: Status,
        code: str | None = None,
        timings: Mapping[str, float] | None = None,
        cache_hit: bool | None = None,
    ) -> None:
        """Counts the end of a job: what failed has a code, what succeeded seconds by phase."""
        self._ended.labels(status, code or "").inc()
        if timings is not None:
            for phase in PHASES:
                self._phases.labels(phase).observe(timings[phase])
            if not cache_hit:
                self._load.observe(timings["load"])
        if cache_hit is not None:
            self._leases.labels("hit" if cache_hit else "miss").inc()

    def steps(self, count: int) -> None:
        """Counts denoising steps; called on the drawing thread."""
        self._steps.inc(count)

    def webhook(self, sent: bool) -> None:
        """Counts a try to deliver a webhook."""
        self._webhooks.labels("sent" if sent else "failed").inc()

    def database_failed(self) -> None:
        """Counts that the database did not answer."""
        self._database_errors.inc()

    def lease_lapsed(self, jobs: int) -> None:
        """Counts jobs taken back from workers that died."""
        self._lapsed.inc(jobs)

    def watch(self, models: ModelService) -> None:
        """Has every page tell of the models in memory."""
        self.registry.register(_Memory(models))

    def page(self, accept: str, ready: bool, queue: "QueueState | None") -> tuple[bytes, str]:
        """Returns everything that was counted, and how it stands, as `accept` wants it: bytes and their media type."""
        encode, media_type = choose_encoder(accept)
        return encode(_Page(self.registry, ready, queue)), media_type

    @contextmanager
    def served(self, port: int) -> Iterator[None]:
        """Serves everything that was counted on a loopback port inside the block, for a process without routes.

        Raises:
            SettingsError: the port is taken.
        """
        try:
            server, thread = start_http_server(port, "127.0.0.1", self.registry)
        except OSError as error:
            raise SettingsError(f"port {port} cannot be had for the metrics: {error.strerror}") from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@dataclass(frozen=True)
class QueueState:
    """How many jobs of the database wait and run, and how long the oldest has waited."""

    queued: int
    running: int
    head_age_seconds: float


async def queue_state(database: Database) -> QueueState | None:
    """Returns how the queue stands; None without a database."""
    by_state = select(Request.status, func.count()).where(text("status IN ('queued', 'running')"))
    try:
        async with database.reading() as session:
            counts = dict((await session.execute(by_state.group_by(Request.status))).all())
            oldest = select(func.min(Request.id)).where(QUEUED).scalar_subquery()
            since = await session.scalar(select(Request.created_at).where(Request.id == oldest))
    except DatabaseUnavailable:
        return None
    age = 0.0 if since is None else max(0.0, (now() - since).total_seconds())
    return QueueState(counts.get("queued", 0), counts.get("running", 0), age)


class _Page(Collector):
    """What one answer shows."""

    def __init__(self, registry: CollectorRegistry, ready: bool, queue: QueueState | None) -> None:
        self._registry = registry
        self._is_ready = ready
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        ready = "1 while this process takes requests, 0 while /health/ready says why not."
        yield GaugeMetricFamily("sitter_ready", ready, self._is_ready)
        if self._queue is None:
            return
        age = "How long the oldest job of the database has waited."
        yield GaugeMetricFamily("sitter_queue_head_age_seconds", age, self._queue.head_age_seconds)
        jobs = GaugeMetricFamily("sitter_queue_jobs", "Jobs of the database that wait or run.", labels=["state"])
        jobs.add_metric(["queued"], self._queue.queued)
        jobs.add_metric(["running"], self._queue.running)
        yield jobs


class _Memory(Collector):
    """The models in memory, read when somebody asks."""

    def __init__(self, models: ModelService) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        memory = self._models.memory()
        if memory is None:
            return
        yield GaugeMetricFamily("sitter_model_cache_models", "Models in memory.", memory.models)
        used = GaugeMetricFamily("sitter_model_cache_bytes", "What the models in memory take.", labels=["device"])
        budget = GaugeMetricFamily("sitter_model_cache_budget_bytes", "What they may take.", labels=["device"])
        for device, most in memory.budget_bytes.items():
            used.add_metric([device], memory.used_bytes.get(device, 0))
            budget.add_metric([device], most)
        yield used
        yield budget
        yield GaugeMetricFamily("sitter_slot_bytes", "What LoRAs in slots take besides.", memory.slot_bytes)
