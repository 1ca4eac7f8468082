"""What forms send: words, which become what the JSON API would have been sent."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ValidationError

from api.errors import InvalidRequest, SitterError
from api.routes.errors import sentence_of

ModelT = TypeVar("ModelT", bound=BaseModel)

Blank = BeforeValidator(lambda value: value or None)
"""For fields that a form sends empty where nothing was said."""


async def get_form(request: Request) -> dict[str, str]:
    """Returns the words of a form; files are left out."""
    return {name: value for name, value in (await request.form()).items() if isinstance(value, str)}


FormDep = Annotated[dict[str, str], Depends(get_form)]


def checked(model: type[ModelT], asked: Mapping[str, Any]) -> ModelT:
    """Returns what a form asks for. Raises RequestValidationError as a JSON body would."""
    try:
        return model.model_validate(dict(asked))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


def said(error: SitterError | RequestValidationError) -> SitterError:
    """Returns what is wrong with what a form asked for, to be said beside it."""
    return error if isinstance(error, SitterError) else InvalidRequest(sentence_of(error), "Nothing was changed.")
