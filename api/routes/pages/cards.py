"""A job as the pages show it: how far it is, its picture as it sharpens, and what it became."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from api.domain import history
from api.domain.grids import is_cell
from api.domain.history import ENDED, Seen
from api.routes.jobs import describe
from api.routes.pages.visitor import Visitor
from api.wire.jobs import Job
from api.wiring import Service

MOST = 12  # jobs on a page
STAYS = timedelta(minutes=2)  # for which a job that ended stands beside those that came after it


@dataclass(frozen=True)
class Card:
    """A job, who draws it, its size in pixels, and its newest preview as a `data:` address."""

    job: Job
    who: str
    width: int
    height: int
    preview: str | None
    steps_asked: int

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.job.status in ENDED


def who(model_id: str) -> str:
    """Returns what people call a model: Eve, 2 of `eve/eve@2`, and Ada of `models/sitters/ada`."""
    name, _, version = model_id.partition("@")
    said = name.rpartition("/")[2].removesuffix(".safetensors").title()
    return f"{said}, {version}" if version.isdigit() else said


async def card(service: Service, visitor: Visitor, seen: Seen) -> Card:
    """Returns the card of a job."""
    jpeg = None
    if seen.job.status == "running" and seen.job.preview_step:
        jpeg = await history.preview(service.database, seen.job.id)
    asked = seen.job.parameters
    return Card(
        describe(seen, service, visitor.caller),
        who(seen.job.model_id),
        asked.get("width", 512),
        asked.get("height", 512),
        f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else None,
        asked.get("num_inference_steps", 30),
    )


async def lately(service: Service, visitor: Visitor) -> list[Seen]:
    """Returns the visitor's newest drawing, and of those before it what waits, is drawn, or ended just now.

    What is drawn for a grid is looked at there.
    """
    found = await history.page(service.database, visitor.caller, visitor.caller.user_id, None, None, MOST)
    there = [seen for seen in found if seen.images or seen.job.status != "succeeded"]
    drawn = [seen for seen in there if seen.job.kind == "draw" and not is_cell(seen.job)]
    since = datetime.now(UTC) - STAYS
    fresh = [seen for seen in drawn[1:] if seen.job.finished_at is None or seen.job.finished_at > since]
    return [
        seen if seen.job.status in ENDED else await history.look(service.database, seen.job)
        for seen in drawn[:1] + fresh
    ]


async def cards(service: Service, visitor: Visitor, seen: Sequence[Seen]) -> list[Card]:
    """Returns the cards of jobs."""
    return [await card(service, visitor, one) for one in seen]
