"""What a picture's file says of how it was made: PNG text in the A1111 form, and all of it as one JSON object."""

import json
import struct
import zlib
from collections.abc import Mapping

from api import __version__
from api.config import Scheduler
from api.schemas import GenerateRequest

HEADER_END = 33  # bytes of the signature and the chunk IHDR, which comes first
SAMPLERS: dict[Scheduler, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "unipc": "UniPC",
    "lcm": "LCM",
}


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
