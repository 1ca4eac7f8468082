"""What a picture's file says of how it was made: PNG text in the A1111 form, and all of it as one JSON object.

`describe` and `with_text` write it, `read` reads it back, and what other programs wrote in the A1111 form.
"""

import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from PIL.PngImagePlugin import PngImageFile

from api import __version__
from api.config import Scheduler
from api.errors import InvalidRequest
from api.schemas import MAX_PROMPT_CHARACTERS, GenerateRequest

SIGNATURE_END = 8
HEADER_END = 33  # bytes of the signature and the chunk IHDR, which comes first
AROUND = 12  # bytes of a chunk beside its data: length, kind, CRC
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
MOST_LETTERS = 20_000  # of a text that is read
MOST_PIXELS = 99_999  # of a side that is said
UNSEEN = re.compile(r"[^\t\n\r -\ud7ff\ue000-\U0010ffff]")  # control characters, and halves that no page can hold
SAMPLERS: dict[Scheduler, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SPELLINGS: Mapping[str, Scheduler] = {
    "ddim": "ddim",
    "euler": "euler",
    "eulera": "euler_a",
    "eulerancestral": "euler_a",
    "dpmpp2m": "dpmpp_2m",
    "unipc": "unipc",
    "unipcbh2": "unipc",
    "lcm": "lcm",
}
"""Samplers of other programs, as `scheduler_of` spells them."""
SPACINGS = re.compile("(karras|polyexponential|exponential|sgmuniform|uniform|simple|normal|automatic|beta)$")
PAIR = re.compile(r'(\w[\w \-/]{0,40}):\s*("(?:\\.|[^\\"]){1,4000}"|[^,]*)(?:,|$)')
NEGATIVE = re.compile(r"negative prompt:", re.IGNORECASE)
KEYS = {
    "steps": "num_inference_steps",
    "sampler": "scheduler",
    "sampler name": "scheduler",
    "cfg scale": "guidance_scale",
    "cfg": "guidance_scale",
    "guidance scale": "guidance_scale",
    "seed": "seed",
    "size": "size",
}
"""What the A1111 form calls the fields of a request, in small letters."""
SAID = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler", "user_id", "model")


@dataclass(frozen=True)
class Recipe:
    """How a picture was made, as far as its file says.

    Args:
        values: fields of a GenerateRequest, each of which fits.
        size: width and height in pixels, whatever they are; None where nothing is said.
        left_out: what the file says besides and is not to be had here, as it says it.
    """

    values: Mapping[str, Any]
    size: tuple[int, int] | None
    left_out: tuple[str, ...] = ()


def describe(request: GenerateRequest, model_id: str, seed: int, request_id: str) -> dict[str, str]:
    """Returns the texts of a picture by their keyword: `parameters` and `sitter`.

    Args:
        request: what was drawn. Not to be used for prompts that are sensitive.
        model_id: what drew it.
        seed: of this picture.
        request_id: the job it belongs to.

    The fields of `sitter` that a GenerateRequest has draw this picture again, and it alone.
    """
    again = request.model_copy(update={"seed": seed, "num_images": 1})
    sitter = {**again.model_dump(), "model_id": model_id, "version": __version__, "request_id": request_id}
    return {"parameters": _parameters(request, model_id, seed), "sitter": json.dumps(sitter)}


def _parameters(request: GenerateRequest, model_id: str, seed: int) -> str:
    """Returns the A1111 form: the prompt, the negative prompt, and a line of `Key: value` with commas between.

    As `create_infotext` in modules/processing.py of AUTOMATIC1111/stable-diffusion-webui writes it, and its
    `parse_generation_parameters` in modules/infotext_utils.py reads it back.
    """
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": request.scheduler and SAMPLERS[request.scheduler],
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model_id,
        "Version": f"sitter {__version__}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def with_text(png: bytes, texts: Mapping[str, str]) -> bytes:
    """Returns the PNG file with `texts` (keyword → text) in it; the picture is not encoded again."""
    chunks = b"".join(_chunk(keyword, text) for keyword, text in texts.items())
    return png[:HEADER_END] + chunks + png[HEADER_END:]


def _chunk(keyword: str, text: str) -> bytes:
    """Returns a text chunk (PNG specification, third edition, 11.3.3): iTXt where Latin-1 does not do."""
    try:
        kind, data = b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        kind, data = b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def without_text(png: bytes) -> bytes:
    """Returns the PNG file without a word in it; the picture is not encoded again."""
    kept, at = [png[:SIGNATURE_END]], SIGNATURE_END
    while at + AROUND <= len(png):
        end = at + AROUND + int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] not in TEXT_CHUNKS:
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def read(file: IO[bytes]) -> Recipe:
    """Returns what a PNG file says, `sitter` before `parameters`; its picture is not decoded.

    Raises:
        InvalidRequest: it is no PNG, or says nothing.
    """
    try:
        told = PngImageFile(file).info
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidRequest(
            "this file is no PNG that can be read", "Choose a picture as it was downloaded, from here or from A1111."
        ) from error
    texts = [told.get(keyword) for keyword in ("sitter", "parameters")]
    ours, theirs = [text if isinstance(text, str) and len(text) <= MOST_LETTERS else "" for text in texts]
    recipe = next((found for found in (read_json(ours), read_parameters(theirs)) if found and found.values), None)
    if recipe is None:
        raise InvalidRequest(
            "this picture does not say how it was made",
            "Programs that shrink or send pictures often take that out: choose the file as it was downloaded.",
        )
    return recipe


def read_json(text: str) -> Recipe | None:
    """Returns what our own text says, None where it is none."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or "prompt" not in said:
        return None
    sides = [side for side in (said.get("width"), said.get("height")) if isinstance(side, int)]
    size = (sides[0], sides[1]) if len(sides) == 2 and all(0 < side <= MOST_PIXELS for side in sides) else None
    return _recipe({name: said[name] for name in SAID if said.get(name) is not None}, size)


def read_parameters(text: str) -> Recipe:
    """Returns what a text in the A1111 form says: `_parameters` tells where that is from.

    Its values stand in one line of `Key: value`, which some programs add further lines to. A text without that line
    is a prompt.
    """
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", UNSEEN.sub("", text).strip())]
    pairs = [_pairs(line) for line in lines]
    end = max((at for at, found in enumerate(pairs) if len(found) >= 2), default=len(lines))  # one may be of a prompt
    said: dict[str, Any] = dict(pairs[end]) if end < len(lines) else {}
    begin = next((at for at, line in enumerate(lines[:end]) if NEGATIVE.match(line)), end)
    said["prompt"] = "\n".join(lines[:begin])
    said["negative_prompt"] = NEGATIVE.sub("", "\n".join(lines[begin:end]), count=1)
    sides = re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", said.pop("size", ""))
    size = (int(sides[1]), int(sides[2])) if sides and int(sides[1]) * int(sides[2]) else None
    return _recipe({name: value for name, value in said.items() if value}, size)


def scheduler_of(sampler: str) -> Scheduler | None:
    """Returns which of ours a sampler is, by any of its names (`DPM++ 2M Karras`, `k_euler_ancestral`), or None."""
    plain = re.sub(r"[^a-z0-9+]", "", sampler.lower()).replace("+", "p")
    plain = SPACINGS.sub("", plain)
    return SPELLINGS.get(plain) or SPELLINGS.get(plain.removeprefix("k"))


def _pairs(line: str) -> dict[str, str]:
    """Returns the values of a line by the names of our fields; of two for one field the first."""
    found: dict[str, str] = {}
    for key, value in PAIR.findall(line[:MOST_LETTERS]):
        if name := KEYS.get(key.strip().lower()):
            found.setdefault(name, _unquoted(value.strip()))
    return found


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def _recipe(said: Mapping[str, Any], size: tuple[int, int] | None) -> Recipe:
    values: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in said.items():
        try:
            fits = GenerateRequest.model_validate({"prompt": "-", name: _as_asked(name, value)})
        except ValueError:  # pydantic's is one, too
            called = next((key for key, field in KEYS.items() if field == name), name)
            left_out.append(UNSEEN.sub("", f"{called} {value}")[:60])
        else:
            values[name] = getattr(fits, name)
    return Recipe(values, size, tuple(left_out))


def _as_asked(name: str, value: Any) -> Any:
    """Returns a value as a request has it. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match name:
        case "num_inference_steps" | "seed":
            return int(value)
        case "guidance_scale":
            return float(value)
        case "scheduler":
            return scheduler_of(value) or value
        case "prompt" | "negative_prompt":
            return value.strip()[:MAX_PROMPT_CHARACTERS]
        case _:
            return value
