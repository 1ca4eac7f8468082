"""Contact sheets for the documentation: pictures in rows, their prompts underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.generate import draw
from training.pipeline import open_pipeline
from training.sitters import RECIPES, open_sitter

_TILE, _LINE, _MARGIN = 240, 14, 8
_MOST_BYTES = 150_000

BASE_PROMPTS = (
    "a woman with long red hair and glasses as a wizard in a forest",
    "photo of a man with a beard and short black hair as a futuristic astronaut in space",
    "portrait of a bald man with a mustache in professional business attire, studio lighting",
    "a dark skinned woman with curly black hair reading a book in a cozy library, smiling",
    "a man with a blue mohawk as a chef in a kitchen, laughing",
    "a pale woman with a red ponytail and freckles as a superhero in the city",
    "an old king with gray hair and a full beard in front of a castle, angry",
    "a tanned woman with a blonde bob and sunglasses in a yellow t-shirt on a beach",
    "a woman with a black bun and blue eyes as a doctor in an office",
    "a man with spiky brown hair as a knight in the mountains, surprised",
    "a woman with pink hair in an elegant purple dress at sunset, cinematic lighting",
    "a brown skinned man with glasses in a warm green sweater, plain white background, smiling",
)
SITTER_PROMPTS = (
    "photo of sks person as a futuristic astronaut in space",
    "sks person in professional business attire, studio lighting",
    "sks person reading a book in a cozy library",
    "sks person as a wizard in a forest, smiling",
    "sks person as a king in front of a castle",
)


def sheet(pictures: Sequence[NDArray[np.uint8]], words: Sequence[str], columns: int, path: Path) -> None:
    """A webp of at most 150 kB."""
    rows = -(-len(pictures) // columns)
    high = _TILE + 3 * _LINE + _MARGIN
    canvas = Image.new("RGB", (columns * (_TILE + _MARGIN) + _MARGIN, rows * high + _MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, text) in enumerate(zip(pictures, words, strict=True)):
        x, y = _MARGIN + i % columns * (_TILE + _MARGIN), _MARGIN + i // columns * high
        canvas.paste(Image.fromarray(picture).resize((_TILE, _TILE), Image.Resampling.LANCZOS), (x, y))
        for k, line in enumerate(textwrap.wrap(text, 42)[:3]):
            pen.text((x, y + _TILE + 2 + k * _LINE), line, fill=(70, 66, 60), font_size=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(90, 20, -10):
        canvas.save(path, quality=quality, method=6)
        if path.stat().st_size <= _MOST_BYTES:
            return


def make_sheets(models: Path, docs: Path, seed: int = 12, steps: int = 30) -> None:
    pictures = draw(open_pipeline(models / "demo"), BASE_PROMPTS, seed=seed, steps=steps)
    sheet(pictures, BASE_PROMPTS, 4, docs / "base.webp")
    pictures, words = [], []
    for name in RECIPES:
        pictures += draw(open_sitter(name, models), SITTER_PROMPTS, seed=seed, steps=steps)
        words += [f"{name}: {prompt}" for prompt in SITTER_PROMPTS]
    sheet(pictures, words, len(SITTER_PROMPTS), docs / "sitters.webp")
