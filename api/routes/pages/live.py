"""What happens to the jobs of a page, as it happens: one stream for all of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends
from fastapi.sse import ServerSentEvent

from api.domain import library
from api.domain.accounts import identify
from api.domain.history import ENDED, POLL_SECONDS, Seen
from api.domain.library import Wanted
from api.domain.wake import Wake
from api.errors import SitterError
from api.routes.jobs import REAUTH_SECONDS, Events
from api.routes.pages import cards
from api.routes.pages.look import PageRoute, render
from api.routes.pages.visitor import Reading, Visitor, VisitorDep, reading
from api.routes.service import ServiceDep
from api.wire.images import Image
from api.wiring import Service

log = structlog.get_logger()
router = APIRouter(route_class=PageRoute, include_in_schema=False)

LATELY = 16
AT_LEAST = 0.2  # seconds between two looks: no eye sees more
State = tuple[str, int, int | None, int, int]


async def counted(service: ServiceDep, visitor: VisitorDep) -> AsyncIterator[None]:
    """Counts a stream among its visitor's until it has ended."""
    with service.accounts.streams.one(visitor.caller.name):
        yield


HowDep = Annotated[Reading, Depends(reading)]


@router.get("/page/live", response_class=Events, dependencies=[Depends(counted)])
async def live(visitor: VisitorDep, service: ServiceDep, how: HowDep) -> AsyncIterator[ServerSentEvent]:
    """Sends the visitor's drawings whenever one of them changed, until the server stops."""
    try:
        async with aclosing(_changes(visitor, service, how)) as found:
            async for one in found:
                yield ServerSentEvent(raw_data=one)
    except SitterError as error:  # who comes back is told by the status of that answer
        log.info("stream_ended", code=error.code)


async def _changes(visitor: Visitor, service: Service, how: Reading) -> AsyncGenerator[str]:
    told, authenticated = set[State](), time.monotonic()
    while not service.worker.draining:
        found = await cards.lately(service, visitor)
        states = {_state(seen) for seen in found}
        if news := states - told:  # what only went stays on the page: somebody may be looking at it
            ended = {seen.job.id for seen in found if seen.job.status in ENDED} & {state[0] for state in news}
            told = states
            yield await changed(service, visitor, how, found, with_pictures=bool(ended))
        await asyncio.sleep(AT_LEAST)
        await change(service.wake, [seen.job.id for seen in found if seen.job.status not in ENDED])
        if time.monotonic() - authenticated >= REAUTH_SECONDS:
            visitor = replace(visitor, caller=await identify(service.accounts, visitor.sent))
            authenticated = time.monotonic()


async def changed(
    service: Service, visitor: Visitor, how: Reading, found: Sequence[Seen], *, with_pictures: bool
) -> str:
    """Returns the HTML that puts these jobs where those stood that were there, and new pictures among the others."""
    drawn = await pictures(service, visitor) if with_pictures else []
    shown = await cards.cards(service, visitor, found)
    return render(how, "_changed.html", visitor=visitor, cards=shown, lately=drawn)


async def pictures(service: Service, visitor: Visitor) -> list[Image]:
    """Returns what was drawn lately."""
    owner = visitor.caller.user_id
    return await library.page(service.database, service.vault, visitor.caller, owner, Wanted(), None, LATELY)


def _state(seen: Seen) -> State:
    job = seen.job
    return job.id, job.revision, seen.position, job.attempt, job.preview_step or 0


async def change(wake: Wake, job_ids: list[str]) -> None:
    """Returns once one of the jobs changed, or a new one came, or after a second."""
    waits = [asyncio.ensure_future(wake.wait(topic, POLL_SECONDS)) for topic in (*job_ids, Wake.QUEUE)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waits:
            one.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
