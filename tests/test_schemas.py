from typing import Any

import pytest
from pydantic import ValidationError

from api.schemas import MAX_PROMPT_CHARACTERS, MAX_SEED, GenerateRequest
from tests.test_config import BAD_USERS


def test_the_defaults_are_those_of_the_contract() -> None:
    assert GenerateRequest(prompt="a cat").model_dump() == {
        "prompt": "a cat",
        "user_id": "default",
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "width": 512,
        "height": 512,
        "seed": None,
        "negative_prompt": None,
        "scheduler": None,
        "num_images": 1,
        "preset": None,
        "model": None,
        "model_version": None,
        "adapters": [],
        "reproducible": False,
    }


GOOD: dict[str, list[Any]] = {
    "prompt": ["x", "x" * MAX_PROMPT_CHARACTERS, "日本の猫", "two\nlines\tand a tab"],
    "user_id": ["default", "x" * 64],
    "num_inference_steps": [1, 150],
    "guidance_scale": [1.0, 20.0, 7],
    "width": [256, 1024],
    "height": [256, 1024],
    "seed": [None, 0, MAX_SEED],
    "negative_prompt": [None, "", "x" * MAX_PROMPT_CHARACTERS],
    "scheduler": [None, "ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"],
    "num_images": [1, 4],
    "reproducible": [True, False],
}
BAD: dict[str, list[Any]] = {
    "prompt": ["", " \n\t ", "x" * (MAX_PROMPT_CHARACTERS + 1), "NUL \0", "escape \x1b[0m", None, 1, ["a"]],
    "user_id": [*BAD_USERS, None, 1],
    "num_inference_steps": [0, 151, -1, 1.5, 30.0, "30", True, None],
    "guidance_scale": [0.99, 20.01, float("nan"), float("inf"), "7.5", True, None],
    "width": [255, 1025, 0, -512, 512.0, "512", 10**30, None],
    "height": [255, 1025, None],
    "seed": [-1, MAX_SEED + 1, 1.0, "1", True],
    "negative_prompt": ["x" * (MAX_PROMPT_CHARACTERS + 1), "NUL \0", 1],
    "scheduler": ["plms", "", 1],
    "num_images": [0, 5, 1.0, True, None],
    "reproducible": [1, "yes", None],
    "unknown": [1],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_what_fits_is_taken(name: str, value: Any) -> None:
    assert getattr(GenerateRequest(**{"prompt": "a cat", name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_what_does_not_fit_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest(**{"prompt": "a cat", name: value})
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]


def test_the_prompt_is_required_and_trimmed() -> None:
    with pytest.raises(ValidationError):
        GenerateRequest()  # type: ignore[call-arg]
    assert GenerateRequest(prompt="  a cat \n").prompt == "a cat"


def test_every_field_of_the_wire_is_described_with_an_example() -> None:
    for name, field in GenerateRequest.model_fields.items():
        assert field.description, name
        assert field.examples, name


def test_seeds_may_not_run_over() -> None:
    GenerateRequest(prompt="x", seed=MAX_SEED - 3, num_images=4)
    with pytest.raises(ValidationError, match="too large for that many pictures"):
        GenerateRequest(prompt="x", seed=MAX_SEED - 2, num_images=4)
