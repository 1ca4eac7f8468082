"""What a form asks for, and a form filled in to ask for it again."""

import math
import re
import secrets
from collections.abc import Mapping
from typing import Any, get_args

from api.config import DEFAULT_USER, Scheduler
from api.domain import history
from api.domain.png_text import Recipe
from api.domain.submit import work
from api.errors import InvalidRequest
from api.routes.pages.forms import checked
from api.routes.pages.sitters import Sitter
from api.routes.pages.visitor import Visitor
from api.wire.images import Image
from api.wire.jobs import JobRequest
from api.wiring import Service

SHAPES = {"square": (512, 512), "portrait": (512, 640), "wide": (768, 512), "story": (512, 896)}
SAMPLERS: tuple[Scheduler, ...] = get_args(Scheduler)
NUMBERS: Mapping[str, type[int] | type[float]] = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "num_images": int,
    "seed": int,
}


def new_key() -> str:
    """Returns what a form sends along so that it is heeded once."""
    return secrets.token_hex(14)


def key_of(form: Mapping[str, str]) -> str | None:
    """Returns the `new_key` that came along; None where none did."""
    key = form.get("key", "")
    return key if re.fullmatch("[0-9a-f]{28}", key) else None


def order_of(form: Mapping[str, str]) -> JobRequest:
    """Returns what a form asks for. Raises RequestValidationError, InvalidRequest."""
    asked: dict[str, Any] = {"prompt": form.get("prompt", "")}
    for name, number in NUMBERS.items():
        if text := form.get(name, "").replace(" ", "").strip():
            try:
                asked[name] = number(text)
            except ValueError as error:
                raise InvalidRequest(f"{name} is no number", "Leave a seed empty for a random one.") from error
    shape = form.get("shape", "square")
    if shape not in SHAPES:
        raise InvalidRequest(f"there is no shape {shape[:20]}")
    asked["width"], asked["height"] = SHAPES[shape]
    asked |= {name: form[name] for name in ("negative_prompt", "scheduler") if form.get(name, "").strip()}
    user_id, _, model = form.get("who", "").partition("/")
    asked |= {name: value for name, value in (("user_id", user_id), ("model", model)) if value}
    if form.get("sensitive"):
        asked["sensitive"] = True
    return checked(JobRequest, asked)


async def expected(service: Service, *orders: JobRequest) -> float | None:
    """Returns in how many seconds all of them would be drawn if they were asked for now; None when nobody knows."""
    return await history.expected_seconds(service.database, sum(work(order.drawing()) for order in orders))


def defaults() -> dict[str, Any]:
    """Returns the form as it is before anybody filled it in."""
    plain = JobRequest(prompt="-")
    known = ("num_inference_steps", "guidance_scale", "num_images", "seed", "negative_prompt", "scheduler")
    return {name: getattr(plain, name) for name in known} | {"prompt": "", "shape": "square"}


def chosen(everybody: list[Sitter], who: str | None) -> str:
    """Returns who of `everybody` is chosen: `who` if they are among them, else the first."""
    values = [one.value for one in everybody]
    if who in values:
        return who
    return values[0] if values else f"{DEFAULT_USER}/{DEFAULT_USER}"


def draft_of(image: Image, same_seed: bool) -> dict[str, Any]:
    """Returns the form that draws a picture again, with its seed or another."""
    made = image.parameters
    asked = {
        "prompt": image.prompt,
        "negative_prompt": image.negative_prompt,
        "num_inference_steps": made.num_inference_steps,
        "guidance_scale": made.guidance_scale,
        "scheduler": made.scheduler,
        "seed": made.seed if same_seed else None,
        "shape": shape_of(made.width, made.height),
        "who": who_drew(image),
    }
    return {name: value for name, value in asked.items() if value is not None}


def draft_from(recipe: Recipe) -> dict[str, Any]:
    """Returns the form that draws what a file says."""
    values = dict(recipe.values)
    user_id, model = values.pop("user_id", None), values.pop("model", None)
    if user_id:
        values["who"] = f"{user_id}/{model or DEFAULT_USER}"
    if recipe.size:
        values["shape"] = shape_of(*recipe.size)
    return values


def who_drew(image: Image) -> str:
    """Returns what names in a form the model that drew a picture."""
    # `eve/eve@1` is a model of Eve's own; those that the operator configured have paths, or ids of the hub.
    own = image.model_id.startswith(f"{image.user_id}/") and "@" in image.model_id
    return image.model_id.partition("@")[0] if own else f"{image.user_id}/{DEFAULT_USER}"


def shape_of(width: int, height: int) -> str:
    """Returns the shape whose sides are most nearly as those are to each other."""

    def off(shape: str) -> float:
        across, down = SHAPES[shape]
        return abs(math.log(across / down * height / width))

    return min(SHAPES, key=off)


async def again(service: Service, visitor: Visitor, image: Image) -> JobRequest | None:
    """Returns the request that draws a picture again, and it alone; None where its prompt is kept from the visitor."""
    if image.prompt is None:
        return None
    seen = await history.find(service.database, visitor.caller, image.request_id)
    return JobRequest.model_validate(
        seen.job.parameters
        | {"prompt": image.prompt, "negative_prompt": image.negative_prompt, "user_id": image.user_id}
        | {"seed": image.parameters.seed, "num_images": 1, "sensitive": image.sensitive}
    )
