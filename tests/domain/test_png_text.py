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
from api.domain.png_text import SAMPLERS, Recipe, describe, read, read_parameters, scheduler_of, with_text, without_text
from api.errors import InvalidRequest
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


def test_without_text_nothing_is_said_and_the_picture_stays() -> None:
    plain = png((30, 20))
    assert without_text(with_text(plain, {"parameters": "a knight", "sitter": "grüße 👋"})) == plain
    assert without_text(plain) == plain
    assert without_text(b"\x89PNG") == b"\x89PNG"


def read_from(texts: dict[str, str]) -> Recipe:
    return read(io.BytesIO(with_text(png(), texts)))


def test_our_own_picture_is_read() -> None:
    texts = describe(REQUEST, "models/sitters/ada", 42, "a" * 28)
    recipe = read_from(texts)
    assert recipe.values == {
        "prompt": REQUEST.prompt,
        "negative_prompt": "blurry, sunglasses",
        "num_inference_steps": 30,
        "guidance_scale": 6.5,
        "seed": 42,
        "scheduler": "dpmpp_2m",
        "user_id": "ada",
    }
    assert (recipe.size, recipe.left_out) == ((320, 512), ())
    without_json = read_from({"parameters": texts["parameters"]})
    assert without_json.values == {name: value for name, value in recipe.values.items() if name != "user_id"}
    assert without_json.size == (320, 512)


KNIGHT = {"prompt": "a knight", "num_inference_steps": 20, "guidance_scale": 7.0, "seed": 5}
LINE = "Steps: 20, CFG scale: 7, Seed: 5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a knight\n{LINE}", KNIGHT),
        (f"a knight\r\n{LINE}\r\n", KNIGHT),
        (f"a knight\n{LINE}\nTemplate: a {{knight|wizard}}\nNegative Template: x", KNIGHT),
        (f"a knight\nNegative prompt: \n{LINE}", KNIGHT),
        ("a knight\nsteps: 20, cfg scale: 7.0, seed: 5", KNIGHT),
        ('a knight\nSteps: 20, CFG scale: 7, Seed: 5, Hashes: {"model": "a", "seed": "9"}', KNIGHT),
        ('a knight\nSteps: "20", CFG scale: 7, Seed: 5, Lora hashes: "a: b, Steps: 3"', KNIGHT),
        (f"a knight\x00\x1b\n{LINE}, Token merging ratio: 0.5", KNIGHT),
        (f"Negative prompt: fog\n{LINE}", {**KNIGHT, "negative_prompt": "fog"} | {"prompt": None}),
        (
            'a (knight:1.2), "old", <lora:x:1>\nin: fog\n'
            f'Negative prompt: blurry, "ugly"\nnegative prompt: twice\n{LINE}',
            KNIGHT
            | {"prompt": 'a (knight:1.2), "old", <lora:x:1>\nin: fog'}
            | {"negative_prompt": 'blurry, "ugly"\nnegative prompt: twice'},
        ),
        ("a knight", {"prompt": "a knight"}),
        ("a knight, at: night, by: day, in: fog", {"prompt": "a knight, at: night, by: day, in: fog"}),
        ("", {}),
    ],
)
def test_other_programs_are_read(text: str, expected: dict[str, object]) -> None:
    assert read_parameters(text).values == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("Euler a", "euler_a"),
        ("Euler Ancestral", "euler_a"),
        ("k_euler_a", "euler_a"),
        ("k_euler_ancestral", "euler_a"),
        ("euler", "euler"),
        ("Euler Simple", "euler"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("dpmpp_2m_sgm_uniform", "dpmpp_2m"),
        ("DDIM", "ddim"),
        ("UniPC", "unipc"),
        ("uni_pc_bh2", "unipc"),
        ("LCM", "lcm"),
        ("DPM++ 2M SDE Karras", None),
        ("DPM++ SDE", None),
        ("Heun", None),
        ("", None),
    ],
)
def test_samplers_have_many_names(sampler: str, scheduler: str | None) -> None:
    assert scheduler_of(sampler) == scheduler


def test_every_sampler_that_we_write_is_read() -> None:
    assert {scheduler_of(name) for name in SAMPLERS.values()} == set(SAMPLERS)


@pytest.mark.parametrize(("size", "expected"), [("512x768", (512, 768)), ("512 × 768", (512, 768)), ("0x9", None)])
def test_sizes_are_read_whatever_they_are(size: str, expected: tuple[int, int] | None) -> None:
    assert read_parameters(f"p\n{LINE}, Size: {size}, Clip skip: 2").size == expected


def test_what_is_not_to_be_had_here_is_told() -> None:
    recipe = read_parameters("p\nSteps: 900, Sampler: Heun, CFG scale: nan, Seed: -1")
    assert recipe.values == {"prompt": "p"}
    assert recipe.left_out == ("steps 900", "sampler Heun", "cfg scale nan", "seed -1")


@pytest.mark.parametrize(
    "text", ["[" * 20_000, '{"prompt": 7}', "{}", "null", "{", '{"prompt": "p", "seed": "x", "width": "w"}']
)
def test_json_of_any_kind_breaks_nothing(text: str) -> None:
    recipe = read_from({"sitter": text, "parameters": "a knight"})
    assert recipe.values.get("prompt", "none") in {"a knight", "p", "none"}


def test_json_says_nothing_that_a_page_cannot_hold() -> None:
    said = {"prompt": "p", "width": 10**400, "height": 1, "scheduler": "\ud800Heun", "negative_prompt": "\0fog"}
    recipe = read_from({"sitter": json.dumps(said)})
    assert recipe == Recipe({"prompt": "p"}, None, recipe.left_out)
    assert sorted(recipe.left_out) == ["negative_prompt fog", "sampler Heun"]
    assert read_from({"sitter": json.dumps({"prompt": "p", "width": 640, "height": 99_999})}).size == (640, 99_999)


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", png()[:20], png(), with_text(png(), {"Title": "x"})]
)
def test_a_file_that_says_nothing_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(io.BytesIO(data))


def test_long_texts_are_not_read() -> None:
    for text in ("x" * 1_000_000, " " * 1_000_000, 'a: "' * 100_000):
        with pytest.raises(InvalidRequest):
            read_from({"parameters": text})


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text_is_read(text: str) -> None:
    for value in read_parameters(f"{text}\n{LINE}").values.values():
        assert value is not None
