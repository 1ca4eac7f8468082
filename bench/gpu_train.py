"""What a training costs on a GPU: a LoRA of rank 16, one picture of 512 × 512 in a batch, from photos to the file."""

import io
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from api.config import ModelSource, load_settings
from api.engine.dreambooth import Report
from api.engine.lesson import Lesson
from api.model_service import ModelService
from bench.figures import Figure, at_least, at_most, seconds
from bench.ways import DEVICE

PHOTOS = 6
RANK = 16


def figures(model: Path, folder: Path, steps: int, side: int) -> Iterator[Figure]:
    """Yields steps a second, the seconds of a whole training, loading and samples included, and the peak of memory.

    Args:
        model: the base.
        folder: where photos of the class and candidates are written.
        steps: of the training.
        side: in pixels, of what is learned.
    """
    ended = list[float]()

    def note(report: Report) -> None:
        if report.phase == "training":
            ended.append(time.perf_counter())

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    base = ModelSource(base=str(model))
    lesson = Lesson(_photos(side), "person", steps=steps, rank=RANK, prior_preservation=False, resolution=side)
    models = ModelService(load_settings(user_models={"default": base}, log_level="error", data_dir=str(folder)))
    try:
        home = folder / "training"
        home.mkdir()
        spent = seconds(lambda: models.train(base, lesson, home, note))
    finally:
        models.close()
    each = [after - before for before, after in itertools.pairwise(ended)]
    yield at_least("gpu_train_steps_per_s", 1 / statistics.median(each), "1/s", 15)
    yield at_most("gpu_train_400_s", spent, "s", 60)
    if DEVICE == "cuda":
        yield Figure("peak memory of a training", torch.cuda.max_memory_allocated() / 1e9, "GB")


def _photos(side: int) -> list[bytes]:
    """Returns PNGs of noise: what is learned of them does not matter here."""
    chance = np.random.default_rng(0)
    photos = []
    for _ in range(PHOTOS):
        buffer = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
        photos.append(buffer.getvalue())
    return photos
