"""A compiled UNet draws what a plain one draws, and meets nothing new once it is warm."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from api.engine import slots
from api.engine.adapters import Adapter, load_adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.pipeline import draw
from api.engine.warming import warm
from api.model_service import ModelService
from tests import builders
from tests.builders import LINEAR, OUT

CELLS = 32  # of latents, for 256 pixels
MOST_ROWS = 4
ROUNDING = 2  # levels of 255: how many rows a batch has changes the last digits of latents


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts what is compiled, and translates it to no machine code: that takes minutes."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(slots, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def test_once_warm_nothing_is_compiled_for_users_who_come(tmp_path: Path, compiler: CompileCounterWithBackend) -> None:
    pipeline = builders.pipeline()
    plain, base, batch = Base(pipeline, 4), Base(pipeline, 4, compiled=True), Batch(MOST_ROWS)
    try:
        warm(base, batch, MOST_ROWS, CELLS, CELLS)
        known = compiler.frame_count
        assert known == 2  # of two rows, and of four
        adapters: list[Adapter | None] = [None]
        for seed in range(3):
            factors = builders.factors(pipeline.unet, (LINEAR, OUT), rank=16, seed=seed)
            file = builders.diffusers_lora(tmp_path / f"{seed}.safetensors", factors, {})
            adapters.append(load_adapter(file, pipeline, 1.0))
        for adapter in adapters:
            for guidance_scale in (7.5, 1.0):
                request = builders.request(guidance_scale=guidance_scale)
                drawn, expected = (draw(each, adapter, request, 3, batch, lambda step: None) for each in (base, plain))
                pixels = [np.asarray(each.images[0], int) for each in (drawn, expected)]
                assert np.abs(pixels[0] - pixels[1]).max() <= ROUNDING
                assert drawn.lane == expected.lane
        assert compiler.frame_count == known
    finally:
        batch.close()


def test_where_nothing_can_be_compiled_all_is_drawn_as_it_is(
    monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("there is no compiler here")

    monkeypatch.setattr(slots, "BACKEND", no_compiler)
    users = {"default": builders.source(base_folder)}
    drawn = []
    for compiled in (True, False):
        service = ModelService(builders.settings(users, compile=compiled))
        try:
            drawn.append(service.generate(builders.request()).pngs)
        finally:
            service.close()
    assert drawn[0] == drawn[1]
