import io
import json
import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from api.config import Scheduler
from api.domain.png_text import SAMPLERS, describe, with_text
from api.schemas import GenerateRequest

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_a1111(text: str) -> dict[str, str]:
    """Reads the form as A1111 does: the last line is values, what begins with `Negative prompt:` is that."""
    *lines, last = text.strip().split("\n")
    assert len(PAIR.findall(last)) >= 3, "A1111 takes a last line of fewer values for a part of the prompt"
    found: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    into = "Prompt"
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("Negative prompt:"):
            into, stripped = "Negative prompt", stripped[16:].strip()
        found[into].append(stripped)
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in PAIR.findall(last)}
    return {key: "\n".join(text) for key, text in found.items()} | values


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


def texts_of(data: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, PngImageFile)
        image.load()
        assert image.getpixel((0, 0)) == (0, 128, 128)
        return dict(image.text)


REQUEST = GenerateRequest(
    prompt="photo of sks person,\nas an astronaut: helmet off",
    negative_prompt="blurry, sunglasses",
    user_id="ada",
    num_images=3,
    seed=41,
    scheduler="dpmpp_2m",
    guidance_scale=6.5,
    width=320,
)


def test_the_a1111_form_is_read_back() -> None:
    text = describe(REQUEST, "models/sitters/ada", 42, "a" * 28)["parameters"]
    assert read_a1111(text) == {
        "Prompt": REQUEST.prompt,
        "Negative prompt": "blurry, sunglasses",
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "CFG scale": "6.5",
        "Seed": "42",
        "Size": "320x512",
        "Model": "models/sitters/ada",
        "Version": "sitter 0.1.0",
    }


def test_what_is_not_given_is_not_said() -> None:
    text = describe(GenerateRequest(prompt="p"), "models/demo", 1, "a" * 28)["parameters"]
    assert text.count("\n") == 1
    assert "Sampler" not in text


@pytest.mark.parametrize("model", ["C:\\models, old\\a.safetensors", 'hub/"x"@main', "a:b", "plain"])
def test_names_with_commas_and_quotes_are_read_back(model: str) -> None:
    read = read_a1111(describe(REQUEST, model, 1, "a" * 28)["parameters"])
    assert read["Model"] == model
    assert read["Version"] == "sitter 0.1.0"


def test_the_json_draws_the_same_picture_again() -> None:
    sitter = json.loads(describe(REQUEST, "models/sitters/ada", 42, "a" * 28)["sitter"])
    extra = {name: sitter.pop(name) for name in ("model_id", "version", "request_id")}
    assert extra == {"model_id": "models/sitters/ada", "version": "0.1.0", "request_id": "a" * 28}
    assert GenerateRequest(**sitter) == REQUEST.model_copy(update={"seed": 42, "num_images": 1})


def test_every_scheduler_has_a_name() -> None:
    assert set(SAMPLERS) == set(get_args(Scheduler))


@given(prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_prompt_is_read_back_from_the_file(prompt: str) -> None:
    if not prompt.strip():
        return
    request = GenerateRequest(prompt=prompt)
    expected = describe(request, "models/demo", 7, "a" * 28)
    found = texts_of(with_text(png(), expected))
    assert found == expected
    assert json.loads(found["sitter"])["prompt"] == request.prompt


def test_the_picture_itself_stays_as_it_was() -> None:
    plain = png((300, 200))
    described = with_text(plain, {"parameters": "grüße 👋"})
    with Image.open(io.BytesIO(plain)) as before, Image.open(io.BytesIO(described)) as after:
        assert before.tobytes() == after.tobytes()
    assert with_text(plain, {}) == plain
