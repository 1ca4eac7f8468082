"""Training sitters over the bundled base: people never seen, six pictures each, as `sitter train` does it."""

import io
import shutil
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from api.config import ROOT, ModelSource, load_settings
from api.domain.photos import examine
from api.engine.lesson import Lesson
from api.model_service import ModelService
from api.schemas import GenerateRequest
from bench.figures import Figure, at_least, at_most, seconds
from training.evaluate import NEW_SCENES, Reading, Score, sitter_prompt
from training.portrait import render
from training.reader import open_reader
from training.sitters import WHO, reference_specs
from training.world import IDENTITY, Identity, Spec, held_out_spec

DEMO = ModelSource(base="models/demo")
PEOPLE = 10
SEED = 123
AT_ONCE = 8
PACED = 20  # pictures whose latencies are compared


def figures(people: int = PEOPLE) -> Iterator[Figure]:
    """Yields how long a sitter takes, how alike and obedient they are, and what others wait for meanwhile."""
    rng, scenes = Random(SEED), Random(5)
    identities = [held_out_spec(rng).identity for _ in range(people)]
    prompts = [sitter_prompt(scene, scenes) for scene in NEW_SCENES]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        models = ModelService(load_settings(log_level="error", data_dir=folder))
        try:
            base = _read(models, DEMO, [prompt.replace(WHO, "a person") for prompt in prompts])
            spent, kept, obeyed = list[float](), Score(), Score()
            for number, identity in enumerate(identities):
                home = Path(folder) / str(number)
                home.mkdir()
                spent.append(seconds(partial(_train, models, identity, home)))
                lora = DEMO.model_copy(update={"lora": str(home / "best.safetensors")})
                _judge(identity, _read(models, lora, prompts), kept, obeyed)
            yield at_most("train_seconds", statistics.median(spent), "s", 120)
            yield Figure("the longest of them", max(spent), "s")
            yield at_least("train_likeness", kept.share, "share", 0.9)
            yield at_least("train_obedience", obeyed.share / _note_obeyed(base, Score()).share, "ratio", 0.95)
            yield at_most("train_generation_p95_ratio", _p95_ratio(models, identities[0], Path(folder)), "ratio", 1.5)
        finally:
            models.close()


def _train(models: ModelService, identity: Identity, folder: Path) -> None:
    photos = examine(_png(render(spec, 512)) for spec in reference_specs(identity))
    lesson = Lesson([verdict.photo.png for verdict in photos if verdict.photo], "person", seed=SEED)
    models.train(DEMO, lesson, folder, lambda report: None).file.replace(folder / "best.safetensors")


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _read(models: ModelService, source: ModelSource, prompts: Sequence[str]) -> list[Reading]:
    """Returns what the reader sees in a picture of each prompt."""
    requests = [GenerateRequest(prompt=prompt, seed=500 + seed) for seed, prompt in enumerate(prompts)]
    with models.lease(source) as model, ThreadPoolExecutor(AT_ONCE) as pool:
        drawings = list(
            pool.map(lambda one: models.engine.draw(model, one, one.seed or 0, lambda step: None), requests)
        )
    return open_reader(ROOT / "models" / "reader").read([np.asarray(one.images[0]) for one in drawings])


def _judge(identity: Identity, seen: Sequence[Reading], kept: Score, obeyed: Score) -> None:
    for reading, scene in zip(seen, NEW_SCENES, strict=True):
        spec = Spec(identity, scene)
        for key in IDENTITY:
            if spec.shows(key):
                kept.add(reading[key] == spec.value(key))
    _note_obeyed(seen, obeyed)


def _note_obeyed(seen: Sequence[Reading], score: Score) -> Score:
    for reading, scene in zip(seen, NEW_SCENES, strict=True):
        score.add(reading["costume"] == scene.costume)
        score.add(reading["place"] == scene.place)
    return score


def _p95_ratio(models: ModelService, identity: Identity, folder: Path) -> float:
    """Returns what a picture takes while somebody is trained over what it takes alone, one after the other."""
    alone, beside = _latencies(models, PACED), list[float]()
    (folder / "beside").mkdir()
    shutil.rmtree(folder / "priors")  # the class's pictures are drawn, too, as for the first sitter
    training = threading.Thread(target=_train, args=(models, identity, folder / "beside"))
    training.start()
    while training.is_alive():
        beside += _latencies(models, 1)
    return _p95(beside) / _p95(alone)


def _latencies(models: ModelService, count: int) -> list[float]:
    """Returns the seconds of pictures that one user has drawn one after the other."""
    request = GenerateRequest(prompt="photo of a person as a knight", user_id="somebody", seed=1)
    return [seconds(partial(models.generate, request)) for _ in range(count)]


def _p95(spent: Sequence[float]) -> float:
    return statistics.quantiles(spent, n=20, method="inclusive")[18]
