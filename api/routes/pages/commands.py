"""How a picture is drawn again without a page: as commands to copy."""

import json
import shlex
from pprint import pformat
from typing import Any

from api.wire.jobs import JobRequest

PYTHON = """import json
{imports}import urllib.request

asked = {asked}
request = urllib.request.Request(
    "{address}/generate/image",
    json.dumps(asked).encode(),
    {headers},
)
with urllib.request.urlopen(request) as answer, open("picture.png", "wb") as file:
    file.write(answer.read())
"""
OPTIONS = {
    "user_id": "--user",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "width": "--width",
    "height": "--height",
    "seed": "--seed",
    "negative_prompt": "--negative-prompt",
    "scheduler": "--scheduler",
    "preset": "--preset",
    "model": "--model",
    "model_version": "--model-version",
}
"""Fields of a request, as options of `sitter generate`."""
HANDLING = {"prompt", "num_images", "sensitive"}  # what a drawing without a server needs no option for


def commands(order: JobRequest, address: str, with_key: bool) -> dict[str, str]:
    """Returns what draws `order` in a shell, in Python, and where it can be done without a server, there.

    Args:
        order: what to draw.
        address: of the server, without a slash at its end.
        with_key: whether the server asks for an API key; it is taken from $KEY.
    """
    asked = _said(order)
    found = {"curl": _curl(asked, address, with_key), "Python": _python(asked, address, with_key)}
    if asked.keys() <= OPTIONS.keys() | HANDLING:
        found["sitter"] = _sitter(asked)
    return found


def _said(order: JobRequest) -> dict[str, Any]:
    """Returns what is not as it would be anyway. A preset decides about what is left out, so nothing is then."""
    whole = order.model_dump(mode="json", exclude_none=True)
    if order.preset is not None:
        return {name: value for name, value in whole.items() if value not in ([], False)}
    plain = JobRequest(prompt=order.prompt).model_dump(mode="json")
    return {name: value for name, value in whole.items() if name == "prompt" or value != plain[name]}


def _curl(asked: dict[str, Any], address: str, with_key: bool) -> str:
    key = ' \\\n    -H "Authorization: Bearer $KEY"' if with_key else ""
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    url = f"{address}/generate/image"
    return f"curl -s {url} -H 'Content-Type: application/json'{key} \\\n    -d {body} -o picture.png\n"


def _python(asked: dict[str, Any], address: str, with_key: bool) -> str:
    key = ', "Authorization": "Bearer " + os.environ["KEY"]' if with_key else ""
    return PYTHON.format(
        imports="import os\n" if with_key else "",
        asked=pformat(asked, width=100, sort_dicts=False),
        address=address,
        headers='{"Content-Type": "application/json"' + key + "}",
    )


def _sitter(asked: dict[str, Any]) -> str:
    said = [f"{OPTIONS[name]}={shlex.quote(str(value))}" for name, value in asked.items() if name in OPTIONS]
    return " ".join(["sitter generate", *said, "-o picture.png --", shlex.quote(asked["prompt"])]) + "\n"
