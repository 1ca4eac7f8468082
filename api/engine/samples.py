"""What a training has drawn, giving way to others: pictures of the class by the base, and a candidate's samples.

A base of the stock lane draws there as for anybody: one picture at a time, on a thread of its own beside the step loop.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from api.engine.adapters import Adapter
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.candidates import Ground, opened
from api.engine.examples import Check, encoded
from api.engine.pipeline import draw, draw_stock, latents_of
from api.engine.stock import StockBase
from api.engine.stock_adapters import StockAdapter
from api.errors import Cancelled
from api.schemas import GenerateRequest

AT_ONCE = 8  # pictures that are drawn together
T = TypeVar("T")


def of_class(base: Base | StockBase, batch: Batch, requests: Sequence[GenerateRequest], check: Check) -> Tensor:
    """Returns, on the host, the latents (pictures, channels, height, width) of what the base draws.

    Raises:
        ModelUnavailable: the step loop cannot draw with this base.
        BadPicture: a picture is not finite.
        Blocked: the model's safety checker refused a picture.
    """
    if isinstance(base, StockBase):
        images = [_by_stock_call(base, None, request, check) for request in requests]
        latents = [batch.run_behind(partial(encoded, base.pipeline, [image]))[0][None] for image in images]
    else:
        latents = _together(lambda request, check: latents_of(base, request, batch, check), requests, check)
    return batch.run_behind(lambda: torch.cat(latents).cpu().clone())


def by_candidate(
    ground: Ground, candidate: Path, requests: Sequence[GenerateRequest], check: Check
) -> list[Image.Image]:
    """Returns the pictures of `requests` by a candidate.

    Raises:
        BadPicture: a picture is not finite.
        Blocked: the model's safety checker refused a picture.
    """
    with opened(ground, candidate) as (base, adapter):
        if isinstance(base, StockBase):
            assert not isinstance(adapter, Adapter)  # it was loaded for this base
            return [_by_stock_call(base, adapter, request, check) for request in requests]
        assert not isinstance(adapter, StockAdapter)
        return _together(partial(_in_batch, base, ground.batch, adapter), requests, check)


def _in_batch(base: Base, batch: Batch, adapter: Adapter | None, request: GenerateRequest, check: Check) -> Image.Image:
    assert request.seed is not None
    return draw(base, adapter, request, request.seed, batch, lambda step: None, check, behind=True).images[0]


def _by_stock_call(
    base: StockBase, adapter: StockAdapter | None, request: GenerateRequest, check: Check
) -> Image.Image:
    assert request.seed is not None
    return draw_stock(base, adapter, request, request.seed, lambda step: check(), check).images[0]


def _together(
    action: Callable[[GenerateRequest, Check], T], requests: Sequence[GenerateRequest], check: Check
) -> list[T]:
    """Returns what `action` does with each, several at once; when one fails the others end at their next step."""
    failed = threading.Event()

    def still_wanted() -> None:
        if failed.is_set():
            raise Cancelled("another picture beside it failed")
        check()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(action, request, still_wanted) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException:
            failed.set()
            raise
