"""Answers 304 to whoever has a file already (RFC 9110, 13.1.2)."""

from typing import Annotated, Any

from fastapi import Header

IfNoneMatch = Annotated[str | None, Header(description="ETags that you have.")]
KNOWN: dict[int | str, dict[str, Any]] = {
    304: {"description": "You have it already: its ETag stands in `If-None-Match`."}
}


def is_known(etag: str, if_none_match: str | None) -> bool:
    """Tells whether the header names `etag`; weak ones count."""
    given = [one.strip().removeprefix("W/") for one in (if_none_match or "").split(",")]
    return "*" in given or etag in given
