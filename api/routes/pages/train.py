"""/people/new: pictures of somebody, their consent, and a button."""

import re
from collections.abc import Sequence
from typing import IO, Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from api.domain import history, photos
from api.domain.models import TOKEN
from api.domain.photos import LEAST, MOST, MOST_BYTES, MOST_FILES, Photo
from api.domain.policy import STATEMENT, STATEMENTS
from api.errors import InvalidRequest
from api.routes import forms, trainings
from api.routes.caller import AccountsDep
from api.routes.pages.asked import key_of, new_key
from api.routes.pages.look import PageRoute, go, page
from api.routes.pages.visitor import CSRF_FIELD, VisitorDep, sent
from api.routes.service import ServiceDep
from api.routes.trainings import PICTURES
from api.wire.models import MOST_RANK, MOST_STEPS, TrainingRequest
from api.wire.text import Text

router = APIRouter(route_class=PageRoute, include_in_schema=False)

OTHER, MARKS = "other_noun", "marks"
MARK = re.compile(r"([0-9a-f]{64})([0-9a-f]{64})")  # a good picture that was looked at: its hash and its fingerprint


@router.get("/people/new")
async def ask(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    name: Annotated[Text, Query(max_length=64)] = "",
    noun: Annotated[Text, Query(max_length=64)] = "person",
    steps: Annotated[int | None, Query(ge=1, le=MOST_STEPS)] = None,
) -> Response:
    """The form; what is known already stands in it."""
    visitor.caller.may("manage")
    return page(
        request,
        visitor,
        "train.html",
        name=name,
        noun=noun,
        steps=steps,
        token=TOKEN,
        statement=STATEMENTS[STATEMENT],
        least=LEAST,
        most=MOST,
        most_steps=MOST_STEPS,
        most_rank=MOST_RANK,
        key=new_key(),
        seconds=await history.expected_training_seconds(service.database, steps),
    )


@router.post("/people/new")
async def begin(request: Request, accounts: AccountsDep, service: ServiceDep) -> Response:
    """Accepts the training that the form asks for, and goes on to where it is followed."""
    async with sent(request, accounts, MOST_FILES) as (visitor, form):
        visitor.caller.may("manage")
        fields = {name: value for name, value in form.items() if isinstance(value, str) and value.strip()}
        asked = {name: value for name, value in fields.items() if name not in (CSRF_FIELD, "key", OTHER)}
        if other := fields.get(OTHER):
            asked.setdefault("class_noun", other.strip())
        order = forms.validated(asked, TrainingRequest)
        seen = await trainings.accept(order, form, service, visitor.caller, key_of(fields))
    return go(request, f"/people/training/{seen.job.id}")


@router.post("/page/people/look")
async def look(request: Request, accounts: AccountsDep) -> Response:
    """What is found of one picture beside others that are good; nothing of it is kept."""
    async with sent(request, accounts, 1) as (visitor, form):
        visitor.caller.may("manage")
        known = [Photo(b"", sha256, int(print_, 16)) for sha256, print_ in MARK.findall(str(form.get(MARKS, "")))]
        files = forms.uploads(form, PICTURES)
        if not files:
            raise InvalidRequest("there is no picture to look at", "Choose one.")
        reason, mark = await anyio.to_thread.run_sync(_look, files[0].file, known, limiter=trainings.one_at_a_time)
    return page(request, visitor, "_verdict.html", reason=reason, mark=mark)


@router.get("/page/people/estimate")
async def estimate(request: Request, visitor: VisitorDep, service: ServiceDep, steps: str = "") -> Response:
    """How long a training of so many steps takes."""
    number = int(steps) if re.fullmatch("[0-9]{1,6}", steps) else None
    seconds = await history.expected_training_seconds(service.database, number)
    return page(request, visitor, "_training_time.html", seconds=seconds)


def _look(file: IO[bytes], known: Sequence[Photo]) -> tuple[str | None, str]:
    """Returns why a picture is refused, or None and its mark."""
    verdict = next(photos.examine([file.read(MOST_BYTES + 1)], known))
    return verdict.reason, f"{verdict.photo.sha256}{verdict.photo.fingerprint:064x}" if verdict.photo else ""
