"""One error shape on the wire, `{"error", "detail", "hint"}`, from one place."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api.errors import InvalidRequest, NotAuthenticated, SitterError
from api.routes.observed import HEADER
from api.schemas import ErrorResponse

log = structlog.get_logger()

HTTP_HINTS = {
    404: "The paths are listed in /docs.",
    405: "The methods of each path are listed in /docs.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI entries of the errors a route may answer with."""
    return {status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in statuses}


def add_error_handlers(app: FastAPI) -> None:
    """Makes every failure of `app` answer in the one shape."""
    app.add_exception_handler(SitterError, _ours)
    app.add_exception_handler(RequestValidationError, _schema)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def error_answer(error: SitterError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns the answer for `error`."""
    body = ErrorResponse(error=error.code, detail=error.detail, hint=error.hint)
    return JSONResponse(body.model_dump(), status_code=error.status, headers=headers)


async def _ours(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SitterError)
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, NotAuthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="sitter"'  # RFC 9110: a 401 says how it wants to be answered
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("request_failed", code=error.code, reason=error.detail)
    return error_answer(error, headers)


async def _schema(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid" or (first["loc"] == ("body",) and first["type"] != "value_error"):
        return error_answer(
            InvalidRequest("the body is not a JSON object", 'Send {"prompt": "…"} as application/json.')
        )
    return error_answer(InvalidRequest(sentence_of(error)))


def sentence_of(error: RequestValidationError) -> str:
    """Returns what is wrong first, and where; the input itself is not repeated: it may be a prompt, or no text."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    message = message.removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    body = ErrorResponse(
        error=code, detail=str(error.detail), hint=HTTP_HINTS.get(error.status_code, InvalidRequest.hint)
    )
    return JSONResponse(body.model_dump(), status_code=error.status_code, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", exc_info=error)
    # This answer is made outside of every middleware, `Observed` too.
    headers = {HEADER: request.scope["request_id"]} if "request_id" in request.scope else {}
    return error_answer(SitterError("something went wrong that should not"), headers)
