"""The arms of the bench `engine`: ways of serving many users' LoRAs, all behind one small interface.

A to F draw on one thread, as the service does, and make the PNGs on threads beside it, as the service does too.
"""

import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from api.config import load_settings
from api.engine.sources import count_values
from api.model_service import PNG_LEVEL, ModelService
from api.schemas import GenerateRequest
from bench import ways
from bench.ways import DEVICE, Given, Way, load_base

JOBS = 8  # in hand at once, and so the most that can share a batch


@dataclass(frozen=True)
class Served:
    """A picture as PNG, and when it was done (`time.perf_counter`)."""

    png: bytes
    at: float


class Arm(Protocol):
    """A way of serving, with its threads."""

    def submit(self, *requests: GenerateRequest) -> "list[Future[Served]]":
        """Takes requests that come at the same time; returns at once."""

    def hold(self, users: Sequence[str]) -> None:
        """Loads the users' models as their requests would, the last user's last."""

    def cpu_seconds(self) -> float:
        """Returns what it has used so far, of every core."""

    def close(self) -> None:
        """Ends the threads."""


class OneThread:
    """Draws what waits on one thread: the first request, and with it whichever others its way allows.

    The base is loaded there, too: another thread that computed would slow this one down (`api/engine/threads.py`).
    """

    def __init__(self, make: Callable[[Given, Any], Way], given: Given) -> None:
        self._waiting: list[tuple[GenerateRequest, Future[Served]]] = []
        self._lock = threading.Lock()
        self._drawing = ThreadPoolExecutor(1)
        self._encoding = ThreadPoolExecutor(JOBS)
        self._way = self._drawing.submit(lambda: make(given, load_base(given.folder, given.dtype))).result()

    def submit(self, *requests: GenerateRequest) -> "list[Future[Served]]":
        pictures = [Future[Served]() for _ in requests]
        with self._lock:
            self._waiting += zip(requests, pictures, strict=True)
        for _ in requests:
            self._drawing.submit(self._turn)  # finds nothing to do when its request went along with an earlier one
        return pictures

    def hold(self, users: Sequence[str]) -> None:
        self._drawing.submit(self._way.hold, users).result()

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self._drawing.shutdown()
        self._encoding.shutdown()

    def _turn(self) -> None:
        if not (batch := self._take()):
            return
        try:
            with torch.inference_mode():
                images = self._way.draw([request for request, _ in batch])
        except Exception as error:
            for _, picture in batch:
                picture.set_exception(error)
            return
        for (_, picture), image in zip(batch, images, strict=True):
            self._encoding.submit(lambda picture, image: picture.set_result(_served(image)), picture, image)

    def _take(self) -> "list[tuple[GenerateRequest, Future[Served]]]":
        with self._lock:
            mates = [one for one in self._waiting[1:] if self._way.together(self._waiting[0][0], one[0])]
            batch = self._waiting[:1] + mates[: JOBS - 1]
            self._waiting = [one for one in self._waiting if one not in batch]
            return batch


class Sitter:
    """G: the service itself, called from JOBS threads.

    Args:
        given: the budget is for users' models, and the base comes on top of it.
        settings: what it does otherwise than usual.
    """

    def __init__(self, given: Given, **settings: Any) -> None:
        self.settings = load_settings(**{**_settings(given), **settings})
        self.service = ModelService(self.settings)
        self._callers = ThreadPoolExecutor(JOBS)

    def submit(self, *requests: GenerateRequest) -> "list[Future[Served]]":
        return [self._callers.submit(self._serve, request) for request in requests]

    def hold(self, users: Sequence[str]) -> None:
        for user_id in users:
            with self.service.lease(self.settings.source_for(user_id)):
                pass

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self._callers.shutdown()
        self.service.close()

    def _serve(self, request: GenerateRequest) -> Served:
        png = self.service.generate(request).pngs[0]
        return Served(png, time.perf_counter())


def user_models(given: Given) -> dict[str, dict[str, str]]:
    """Returns USER_MODELS of the service: the base for `default`, and each user's LoRA over it."""
    base = {"base": str(given.folder)}
    return {"default": base} | {user: {**base, "lora": str(file)} for user, file in given.loras.items()}


def _settings(given: Given) -> dict[str, Any]:
    return {
        "user_models": user_models(given),
        "dtype": str(given.dtype).removeprefix("torch."),
        "compile": given.compiled,
        "use_gpu": DEVICE != "cpu",
        "host_cache_gb": (given.budget + torch.float32.itemsize * count_values(given.folder)) / 1e9,
        "log_level": "error",
    }


def _served(image: Image.Image) -> Served:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return Served(buffer.getvalue(), time.perf_counter())


ARMS: Mapping[str, Callable[[Given], Arm]] = {
    "A own pipelines": lambda given: OneThread(ways.OwnPipelines, given),
    "B load and unload": lambda given: OneThread(ways.LoadEach, given),
    "C hotswap": lambda given: OneThread(ways.HotSwap, given),
    "D peft mixed batch": lambda given: OneThread(ways.MixedBatch, given),
    "F same-user batch": lambda given: OneThread(ways.SameUser, given),
    "G Sitter": Sitter,
    "G without batches": lambda given: Sitter(given, batch_rows=2),
}
REFERENCE = "A own pipelines"  # whose pictures all others must draw
RIVALS = ("A own pipelines", "B load and unload", "C hotswap", "D peft mixed batch")
OURS = "G Sitter"
