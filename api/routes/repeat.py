"""The Idempotency-Key of a request: whoever heard no answer sends it again, and nothing is made twice."""

import json
from typing import Annotated

from fastapi import Depends, Header, Request

from api.domain.once import Repeatable
from api.routes.caller import CallerDep
from api.wire.text import Text

IdempotencyKey = Annotated[
    Text | None,
    Header(
        min_length=1,
        max_length=255,
        description="Any word of yours: the same key and body again get the same answer, and nothing is made twice.",
    ),
]


async def get_repeatable(
    request: Request, caller: CallerDep, idempotency_key: IdempotencyKey = None
) -> Repeatable | None:
    """Returns the request as one that may come again; None without a key."""
    if idempotency_key is None:
        return None
    asked = json.loads(await request.body())
    if isinstance(asked, dict):
        asked.pop("password", None)  # what is kept of a request is too quick a hash for one
    canonical = json.dumps([request.url.path, asked], sort_keys=True)
    return Repeatable(caller.name, idempotency_key, canonical.encode())


RepeatableDep = Annotated[Repeatable | None, Depends(get_repeatable)]
