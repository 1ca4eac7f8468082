"""Reading the pictures of answers."""

import base64
import io
from typing import Any

from PIL import Image, ImageChops

ROUNDING = 2  # levels of 255: how many rows a batch has changes the last digits of latents


def png_of(image: dict[str, Any]) -> bytes:
    return base64.b64decode(image["image_base64"], validate=True)


def open_png(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    picture.load()
    return picture


def pixels_of(image: dict[str, Any]) -> bytes:
    """What is to be seen, without the text in the file: that names the job."""
    return open_png(png_of(image)).tobytes()


def difference(one: bytes, other: bytes) -> int:
    """The largest difference between two PNGs' values, 0 to 255."""
    extrema = ImageChops.difference(open_png(one), open_png(other)).getextrema()
    return max(high for _, high in extrema)  # type: ignore[misc]
