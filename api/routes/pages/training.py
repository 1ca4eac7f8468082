"""/people/training/…: a training as it goes on, and what came of it."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import ServerSentEvent

from api.domain import history, registry
from api.domain.history import ENDED, Seen
from api.errors import NotFound
from api.routes.jobs import Events, cancel_job, describe, streamed
from api.routes.pages.curve import Curve, curve
from api.routes.pages.live import AT_LEAST, HowDep, counted, identified_lately
from api.routes.pages.look import PageRoute, go, is_part, page, render
from api.routes.pages.sitters import pictures_of
from api.routes.pages.visitor import Reading, Visitor, VisitorDep
from api.routes.service import ServiceDep
from api.wire.accounts import Id
from api.wire.jobs import Job
from api.wire.models import Model, TrainingState, Version
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

PHASES = ("checking", "caching", "training", "validating", "publishing", "warming")
ACTIVE: tuple[Literal["queued", "running"], ...] = ("running", "queued")
MOST = 100  # trainings under way that are looked at
Samples = list[tuple[int, str]]  # after which step, and the picture's address


@dataclass(frozen=True)
class Course:
    """A training as it is shown: its job and its model, and the version that came of it, if one did."""

    job: Job
    known: TrainingState
    model: Model | None
    version: Version | None
    samples: list[str]
    curve: Curve | None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.job.status in ENDED

    @property
    def phases(self) -> list[tuple[str, str]]:
        """Every phase, and whether it is `done`, `now` or `next`."""
        at = PHASES.index(self.job.phase) if self.job.phase in PHASES else -1
        if self.job.status == "succeeded":
            at = len(PHASES)
        return [(name, "done" if i < at else "now" if i == at else "next") for i, name in enumerate(PHASES)]

    @property
    def good(self) -> int:
        """How many of the pictures are learned."""
        return sum(picture.good for picture in self.known.pictures)


async def under_way(service: Service, visitor: Visitor) -> dict[str, Job]:
    """Returns the visitor's trainings that wait or run, by the model that they are of; of each the one that is next."""
    found = dict[str, Job]()
    for status in ACTIVE:
        mine = (service.database, visitor.caller, visitor.caller.user_id, status, None, MOST)
        for seen in reversed(await history.page(*mine, kind="train")):
            found.setdefault(seen.job.parameters["model"], describe(seen, service, visitor.caller))
    return found


async def _find(job_id: Id, visitor: VisitorDep, service: ServiceDep) -> Seen:
    """Returns a training. Raises NotFound when there is none of that id that the visitor may see."""
    seen = await history.find(service.database, visitor.caller, job_id)
    if seen.job.kind != "train":
        raise NotFound("there is no such training")
    return seen


SeenDep = Annotated[Seen, Depends(_find)]


@router.get("/people/training/{job_id}")
async def follow(request: Request, seen: SeenDep, visitor: VisitorDep, service: ServiceDep) -> Response:
    """The page of a training."""
    course, newest = await _course(service, visitor, seen), await _newest(service, seen)
    return page(request, visitor, "training.html", course=course, samples=list(newest.values()))


@router.post("/page/people/training/{job_id}/cancel")
async def cancel(request: Request, seen: SeenDep, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Stops a training."""
    visitor.caller.may("draw")
    await cancel_job(seen, service, visitor.caller)
    return Response(status_code=204) if is_part(request) else go(request, f"/people/training/{seen.job.id}")


@router.get(
    "/page/people/training/{job_id}/live", response_class=Events, dependencies=[Depends(_find), Depends(counted)]
)
async def live(job_id: Id, visitor: VisitorDep, service: ServiceDep, how: HowDep) -> AsyncIterator[ServerSentEvent]:
    """Sends what is new of a training, until it has ended or the server stops."""
    async with streamed(_changes(job_id, visitor, service, how)) as found:
        async for one in found:
            yield ServerSentEvent(raw_data=one)


async def _changes(job_id: str, visitor: Visitor, service: Service, how: Reading) -> AsyncGenerator[str]:
    told, sent, shown, identified = None, "", dict[tuple[int, int], tuple[int, str]](), time.monotonic()
    seen = await _find(job_id, visitor, service)
    while not service.worker.draining:
        job = seen.job
        if (state := (job.revision, seen.position, job.attempt, job.preview_step)) != told:
            told, before = state, len(shown)
            if (job.attempt, job.preview_step) not in shown:
                shown |= await _newest(service, seen)
            samples = list(shown.values()) if len(shown) > before or job.status in ENDED else None
            course = await _course(service, visitor, seen)
            html = render(how, "_training.html", visitor=visitor, course=course, samples=samples)
            if html != sent:  # a job that only says that it lives looks as before
                sent = html
                yield html
        if job.status in ENDED:
            return
        await asyncio.sleep(AT_LEAST)
        seen = await history.changed(service.wake, service.database, visitor.caller, seen)
        visitor, identified = await identified_lately(service, visitor, identified)


async def _newest(service: Service, seen: Seen) -> dict[tuple[int, int], tuple[int, str]]:
    """Returns the newest sample of a training that runs, by what tells it from others; none before the first."""
    job = seen.job
    jpeg = await history.preview(service.database, job.id) if job.status == "running" and job.preview_step else None
    if jpeg is None:
        return {}
    address = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {(job.attempt, job.preview_step or 0): (job.preview_step or 0, address)}


async def _course(service: Service, visitor: Visitor, seen: Seen) -> Course:
    job = describe(seen, service, visitor.caller)
    known = job.training or TrainingState(pictures=[])
    model = version = None
    samples = list[str]()
    try:
        model = await registry.find(service.registry, visitor.caller, seen.job.parameters["model"])
        made = await registry.versions(service.registry, visitor.caller, model.id)
    except NotFound:  # erased since
        made = []
    version = next((one for one in made if one.job_id == job.id), None)
    if version is not None:
        samples = pictures_of(version)
    return Course(job, known, model, version, samples, curve(known.losses, job.steps))
