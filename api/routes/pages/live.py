"""What happens to the jobs of a page, as it happens: one stream for all of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated
from weakref import WeakValueDictionary

from fastapi import APIRouter, Depends
from fastapi.sse import ServerSentEvent

from api.domain import library
from api.domain.accounts import identify
from api.domain.history import ENDED, POLL_SECONDS, Seen
from api.domain.library import Wanted
from api.domain.wake import Wake
from api.routes.jobs import REAUTH_SECONDS, Events, streamed
from api.routes.pages import cards
from api.routes.pages.look import PageRoute, render
from api.routes.pages.visitor import Reading, Visitor, VisitorDep, reading
from api.routes.service import ServiceDep
from api.wire.images import Image
from api.wiring import Service

router = APIRouter(route_class=PageRoute, include_in_schema=False)

LATELY = 16
AT_LEAST = 0.5  # seconds between two looks
State = tuple[str, int, int | None, int, int]


async def counted(service: ServiceDep, visitor: VisitorDep) -> AsyncIterator[None]:
    """Counts a stream among its visitor's until it has ended."""
    with service.accounts.streams.one(visitor.caller.name):
        yield


HowDep = Annotated[Reading, Depends(reading)]


@router.get("/page/live", response_class=Events, dependencies=[Depends(counted)])
async def live(visitor: VisitorDep, service: ServiceDep, how: HowDep) -> AsyncIterator[ServerSentEvent]:
    """Sends the visitor's drawings whenever one of them changed, until the server stops."""
    async with streamed(_changes(visitor, service, how)) as found:
        async for one in found:
            yield ServerSentEvent(raw_data=one)


async def _changes(visitor: Visitor, service: Service, how: Reading) -> AsyncGenerator[str]:
    told, identified = frozenset[State](), time.monotonic()
    while not service.worker.draining:
        channel = _channel_of(service, visitor, how)
        seen = await channel.look(service, visitor, how)
        if news := seen.states - told:  # what only went stays on the page: somebody may be looking at it
            told, ended = seen.states, any(state[0] in seen.ended for state in news)
            yield seen.jobs + seen.pictures if ended else seen.jobs
        await change(service.wake, seen.active)
        visitor, identified = await identified_lately(service, visitor, identified)


async def identified_lately(service: Service, visitor: Visitor, identified: float) -> tuple[Visitor, float]:
    """Returns the visitor of a stream with the rights that they have now, and when these were looked up last.

    Raises:
        NotAuthenticated: the credential is not valid any more.
    """
    if time.monotonic() - identified < REAUTH_SECONDS:
        return visitor, identified
    return replace(visitor, caller=await identify(service.accounts, visitor.sent)), time.monotonic()


@dataclass(frozen=True)
class _Look:
    """A visitor's drawings at one moment, and the HTML that puts them, and pictures, where those stood that were."""

    states: frozenset[State]
    ended: frozenset[str]
    jobs: str
    pictures: str

    @property
    def active(self) -> list[str]:
        """Ids of the jobs of which more is to come."""
        return [state[0] for state in self.states if state[0] not in self.ended]


class _Channel:
    """What all streams of one session show: looked up and written once, however many pages are open."""

    def __init__(self) -> None:
        self._last: _Look | None = None
        self._next: asyncio.Task[_Look] | None = None
        self._begun = -AT_LEAST

    async def look(self, service: Service, visitor: Visitor, how: Reading) -> _Look:
        """Returns how it is once this was asked, AT_LEAST after the last look; who asks meanwhile shares it."""
        if self._next is None:
            self._next = asyncio.create_task(self._look(service, visitor, how))
        return await asyncio.shield(self._next)  # a stream that ends shall not end it in the middle of a query

    async def _look(self, service: Service, visitor: Visitor, how: Reading) -> _Look:
        await asyncio.sleep(self._begun + AT_LEAST - time.monotonic())
        self._begun, self._next = time.monotonic(), None  # whoever asks from now on may know of something newer
        found, last = await cards.lately(service, visitor), self._last
        states = frozenset(map(_state, found))
        if last is not None and last.states == states:
            return last
        ended = frozenset(seen.job.id for seen in found if seen.job.status in ENDED)
        jobs = render(how, "_changed.html", visitor=visitor, cards=await cards.cards(service, visitor, found))
        if last is not None and last.ended == ended:
            drawn = last.pictures
        else:
            drawn = render(how, "_drawn.html", visitor=visitor, lately=await pictures(service, visitor))
        self._last = _Look(states, ended, jobs, drawn)
        return self._last


_channels = WeakValueDictionary[tuple[object, ...], _Channel]()  # a stream holds its own


def _channel_of(service: Service, visitor: Visitor, how: Reading) -> _Channel:
    """Returns the channel of everything that what a stream shows depends on."""
    caller = visitor.caller
    key = (service.wake, caller.user_id, caller.is_admin, caller.scopes, visitor.csrf_token, how)
    return _channels.setdefault(key, _Channel())


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
