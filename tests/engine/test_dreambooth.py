"""A whole training on a tiny base: killed, cancelled, failing, and beside drawings."""

import gc
import hashlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from api.engine import dreambooth
from api.engine.dreambooth import SAMPLES, SCENES, Report, Trained, _worth
from api.engine.encoder import ImageEncoder
from api.engine.judge import Scores
from api.engine.lesson import Lesson
from api.engine.reader import AttributeReader
from api.engine.trainer import Recipe, Trainer
from api.errors import BadPicture, Cancelled, InvalidRequest, ModelUnavailable, TrainingFailed
from api.model_service import ModelService
from tests import builders, families

STEPS = 5
LEAST_DB = 40.0
Open = Callable[[], ModelService]


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).resize((512, 512)).save(buffer, "PNG")
    return buffer.getvalue()


LESSON = Lesson([photo(seed) for seed in range(3)], "person", steps=STEPS, rank=2, seed=1)
LESSONS = [LESSON, replace(LESSON, train_text_encoder=True)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures of the class, and fewer steps for each: it is the training that is looked at."""
    monkeypatch.setattr("api.engine.dreambooth.SAMPLE_STEPS", 2)
    monkeypatch.setattr("api.engine.dreambooth.SCENES", SCENES[:SAMPLES])


@pytest.fixture
def open_service(base_folder: Path, tmp_path: Path) -> Iterator[Open]:
    opened = []

    def open_one() -> ModelService:
        sources = {"default": builders.source(base_folder)}
        opened.append(ModelService(builders.settings(sources, data_dir=tmp_path / "data")))
        return opened[-1]

    yield open_one
    for service in opened:
        service.close()


def train(
    service: ModelService,
    base: Path,
    folder: Path,
    report: Any = lambda report: None,
    lesson: Lesson = LESSON,
    **how: Any,
) -> Trained:
    folder.mkdir(exist_ok=True)
    return service.train(builders.source(base), lesson, folder, report, **how)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Killed(BaseException):
    """Ends a training as a signal would: nothing is put in order."""


def test_a_training_ends_with_a_lora_and_its_samples(open_service: Open, base_folder: Path, tmp_path: Path) -> None:
    reports = list[Report]()
    trained = train(open_service(), base_folder, tmp_path / "run", reports.append)
    assert reports[0].phase == "caching"
    steps = [report for report in reports if report.phase == "training"]
    assert [(report.done, report.of) for report in steps] == [(done, STEPS) for done in range(1, STEPS + 1)]
    assert all(report.loss and np.isfinite(report.loss) for report in steps)
    assert sum(report.sample is not None for report in reports) == 3
    assert trained.file.is_file()
    assert trained.step in {3, 4, 5}
    assert len(trained.samples) == 4
    assert trained.scores.likeness is None  # this base has no reader


def psnr(some: Any, other: Any) -> float:
    return 10 * float(np.log10(255**2 / max(1e-9, np.square(some - other).mean())))


def drawn(service: ModelService, user: str) -> Any:
    [png] = service.generate(builders.request(user_id=user)).pngs
    return np.asarray(Image.open(io.BytesIO(png)), float)


def by_diffusers(pipeline: Any) -> Any:
    request = builders.request()
    image = pipeline(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    return np.asarray(image, float)


@pytest.fixture
def quick_learner(base_folder: Path, tmp_path: Path) -> Path:
    """A base of which a few steps make another."""
    folder = builders.copy_of(base_folder, tmp_path / "quick")
    builders.edit_json(folder / "scheduler/scheduler_config.json", lambda config: config.update(_training_rate=0.05))
    return folder


@pytest.mark.parametrize("lesson", LESSONS)
def test_its_file_draws_the_same_in_diffusers(
    open_service: Open, quick_learner: Path, tmp_path: Path, lesson: Lesson
) -> None:
    file = train(open_service(), quick_learner, tmp_path / "run", lesson=lesson).file
    of_unet = {name: one for name, one in load_file(file).items() if name.startswith("unet.")}
    save_file(of_unet, tmp_path / "unet.safetensors")
    source = partial(builders.source, quick_learner)
    sources = {"default": source(), "ada": source(lora=str(file)), "half": source(lora=f"{tmp_path}/unet.safetensors")}
    ours = ModelService(builders.settings(sources))
    try:
        pixels = {user: drawn(ours, user) for user in sources}
    finally:
        ours.close()
    theirs = StableDiffusionPipeline.from_pretrained(quick_learner, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(file)
    assert psnr(pixels["ada"], by_diffusers(theirs)) > LEAST_DB
    assert psnr(pixels["ada"], pixels["default"]) < LEAST_DB
    assert (psnr(pixels["ada"], pixels["half"]) < LEAST_DB) is lesson.train_text_encoder


@pytest.mark.parametrize(("step", "lesson"), [(1, LESSON), (3, LESSON), (4, LESSON), (4, LESSONS[1])])
def test_killed_at_any_step_it_goes_on_to_the_same_end(
    open_service: Open, base_folder: Path, tmp_path: Path, step: int, lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.dreambooth._Saving.is_due", lambda saving: True)
    whole = train(open_service(), base_folder, tmp_path / "whole", lesson=lesson)

    def kill(report: Report) -> None:
        if report.phase == "training" and report.done == step:
            raise Killed

    with pytest.raises(Killed):
        train(open_service(), base_folder, tmp_path / "killed", kill, lesson)
    begun = list[int]()

    def note(report: Report) -> None:
        if report.phase == "training":
            begun.append(report.done)

    again = train(open_service(), base_folder, tmp_path / "killed", note, lesson)
    assert begun[0] == step  # the one that was not saved
    assert (again.step, sha256(again.file)) == (whole.step, sha256(whole.file))


def test_a_loss_that_is_not_finite_ends_it(
    open_service: Open, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_losses", lambda *_: torch.full((1,), torch.nan, requires_grad=True))
    with pytest.raises(TrainingFailed, match="not finite at step 1"):
        train(open_service(), base_folder, tmp_path / "run")


def test_it_is_cancelled_within_a_step(open_service: Open, base_folder: Path, tmp_path: Path) -> None:
    service, stop = open_service(), threading.Event()

    def cancelled() -> None:
        if stop.is_set():
            raise Cancelled("it was cancelled")

    def report(report: Report) -> None:
        if report.phase == "training":
            stop.set()

    with pytest.raises(Cancelled):
        train(service, base_folder, tmp_path / "run", report, check=cancelled)
    assert service.generate(builders.request()).pngs


@pytest.mark.parametrize("lesson", LESSONS)
def test_others_draw_as_ever_meanwhile(open_service: Open, base_folder: Path, tmp_path: Path, lesson: Lesson) -> None:
    service = open_service()
    before = service.generate(builders.request()).pngs[0]
    during = list[bytes]()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, service, base_folder, tmp_path / "run", lesson=lesson)
        while not training.done():
            during.append(service.generate(builders.request()).pngs[0])
        training.result()
    assert during
    assert set(during) <= {before} or all(
        abs(np.asarray(Image.open(io.BytesIO(one)), int) - np.asarray(Image.open(io.BytesIO(before)), int)).max() <= 2
        for one in during
    )


def test_the_class_is_drawn_once_for_all_sitters(open_service: Open, base_folder: Path, tmp_path: Path) -> None:
    service = open_service()
    train(service, base_folder, tmp_path / "one")
    [prior] = (tmp_path / "data" / "priors").iterdir()
    made = prior.stat().st_mtime_ns
    train(service, base_folder, tmp_path / "other")
    assert [file.stat().st_mtime_ns for file in (tmp_path / "data" / "priors").iterdir()] == [made]


def test_without_prior_preservation_the_sitters_pictures_alone_are_learned(
    open_service: Open, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the class those are drawn that the samples are compared with."""
    monkeypatch.setattr("api.engine.dreambooth.SCENES", SCENES[: SAMPLES + 1])
    learned, losses = list[str](), Trainer._losses

    def noted(trainer: Trainer, latents: torch.Tensor, words: Sequence[str], *given: Any) -> torch.Tensor:
        assert len(latents) == len(words)
        learned.extend(words)
        return losses(trainer, latents, words, *given)

    monkeypatch.setattr(Trainer, "_losses", noted)
    alone = replace(LESSON, prior_preservation=False)
    trained = train(open_service(), base_folder, tmp_path / "run", lesson=alone)
    assert len(learned) == trained.recipe.own * STEPS
    assert all("sks person" in words for words in learned)
    assert trained.scores.variety > 0
    [drawn] = (tmp_path / "data" / "priors").iterdir()
    assert len(load_file(drawn)["latents"]) == SAMPLES
    learned.clear()
    train(open_service(), base_folder, tmp_path / "other")
    assert sum("sks" not in words for words in learned) == STEPS


def large(base_folder: Path, folder: Path, **scheduler: Any) -> Path:
    """The base as if it were trained on pictures of 384 pixels."""
    builders.copy_of(base_folder, folder)
    builders.edit_json(folder / "unet/config.json", lambda config: config.update(sample_size=48))
    builders.edit_json(folder / "scheduler/scheduler_config.json", lambda config: config.update(scheduler))
    return folder


def test_smaller_squares_are_learned_and_the_samples_are_as_large_as_ever(
    open_service: Open, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, losses = set[tuple[int, ...]](), Trainer._losses

    def noted(trainer: Trainer, latents: torch.Tensor, *given: Any) -> torch.Tensor:
        sizes.add(tuple(latents.shape))
        return losses(trainer, latents, *given)

    monkeypatch.setattr(Trainer, "_losses", noted)
    service, base = open_service(), large(base_folder, tmp_path / "large")
    lesson = replace(LESSON, steps=2, resolution=256)
    trained = train(service, base, tmp_path / "small", lesson=lesson)
    assert (sizes, trained.recipe.resolution) == ({(2, 4, 32, 32)}, 256)
    assert {image.size for image in trained.samples} == {(384, 384)}
    priors = {tuple(load_file(file)["latents"].shape): file for file in (tmp_path / "data" / "priors").iterdir()}
    assert priors.keys() == {(SAMPLES, 4, 48, 48), (SAMPLES, 4, 32, 32)}  # the same pictures, made smaller
    made = [file.stat().st_mtime_ns for file in priors.values()]
    whole = train(service, base, tmp_path / "whole", lesson=replace(lesson, resolution=None))
    assert (sizes, whole.recipe.resolution) == ({(2, 4, 32, 32), (2, 4, 48, 48)}, 384)
    assert [file.stat().st_mtime_ns for file in priors.values()] == made


@pytest.mark.parametrize(
    ("resolution", "scheduler", "hint"),
    [
        (248, {}, "multiples of 16 from 256"),
        (264, {}, "multiples of 16 from 256"),
        (400, {}, "384 will do"),
        (256, {"_shorter_side": 384}, "384 will do."),  # it draws at that size alone
    ],
)
def test_squares_that_a_base_cannot_learn_are_refused(
    open_service: Open, base_folder: Path, tmp_path: Path, resolution: int, scheduler: dict[str, Any], hint: str
) -> None:
    base = large(base_folder, tmp_path / "large", **scheduler)
    with pytest.raises(InvalidRequest, match=f"squares of {resolution} pixels") as refused:
        train(open_service(), base, tmp_path / "run", lesson=replace(LESSON, resolution=resolution))
    assert hint in refused.value.hint


@pytest.mark.parametrize("lesson", [LESSON, replace(LESSONS[1], resolution=256)])
def test_over_stable_diffusion_xl_a_lora_is_learned_that_its_own_pipeline_loads(
    open_service: Open, tmp_path: Path, lesson: Lesson
) -> None:
    base = families.save("sdxl", tmp_path / "sdxl")
    builders.edit_json(base / "scheduler/scheduler_config.json", lambda config: config.update(_training_rate=0.05))
    if lesson.resolution:
        builders.edit_json(base / "unet/config.json", lambda config: config.update(sample_size=48))
    trained = train(open_service(), base, tmp_path / "run", lesson=lesson)
    assert len(trained.samples) == SAMPLES
    source = partial(builders.source, base)
    ours = ModelService(builders.settings({"default": source(), "ada": source(lora=str(trained.file))}))
    try:
        pixels = {user: drawn(ours, user) for user in ("default", "ada")}
    finally:
        ours.close()
    theirs = StableDiffusionXLPipeline.from_pretrained(base)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(trained.file)
    assert psnr(pixels["ada"], by_diffusers(theirs)) > LEAST_DB
    assert psnr(pixels["ada"], pixels["default"]) < LEAST_DB


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    folder = families.save("sd3", tmp_path / "sd3")
    service = ModelService(builders.settings({"default": builders.source(folder)}))
    try:
        with pytest.raises(ModelUnavailable, match="cannot be trained"):
            train(service, folder, tmp_path / "run")
    finally:
        service.close()


def test_the_state_of_another_lesson_is_not_gone_on_from(open_service: Open, base_folder: Path, tmp_path: Path) -> None:
    service, source, folder = open_service(), builders.source(base_folder), tmp_path / "run"
    train(service, base_folder, folder)
    other, begun = replace(LESSON, noun="dog"), list[int]()
    service.train(source, other, folder, lambda report: begun.append(report.done))
    assert 1 in begun


def scored(likeness: float | None, obedience: float | None, variety: float = 1.0, step: int = 1) -> Trained:
    scores = Scores(likeness, obedience, None if likeness is None else 1.0, variety, AttributeReader.least)
    return Trained(Path("x"), step, scores, [], Recipe(10, 4, 1e-3, 6, 2, 0), "")


def test_a_base_without_a_reader_is_judged_by_an_encoder_which_goes_afterwards(
    base_folder: Path, encoder: Path, tmp_path: Path
) -> None:
    sources = {"default": builders.source(base_folder)}
    service = ModelService(builders.settings(sources, data_dir=tmp_path / "data", judge_encoder=encoder))
    try:
        assert service.engine.device == "cpu"  # it has started: what was there before is not counted any more
        before = sum(type(one) is CLIPModel for one in gc.get_objects())
        trained = train(service, base_folder, tmp_path / "run")
    finally:
        service.close()
    scores = trained.scores
    assert scores.least == ImageEncoder.least
    assert all(score is None or 0 <= score <= 1 for score in (scores.likeness, scores.obedience, scores.class_kept))
    assert scores.by_name().keys() == {"likeness", "obedience", "class_kept", "variety"}
    assert scores.class_kept is not None
    gc.collect()
    assert sum(type(one) is CLIPModel for one in gc.get_objects()) == before


def test_an_encoder_that_does_not_load_is_told_before_anything_is_learned(
    base_folder: Path, detector: Path, tmp_path: Path
) -> None:
    sources = {"default": builders.source(base_folder)}
    service = ModelService(builders.settings(sources, data_dir=tmp_path / "data", judge_encoder=detector))
    reports = list[Report]()
    try:
        with pytest.raises(ModelUnavailable):
            train(service, base_folder, tmp_path / "run", reports.append)
    finally:
        service.close()
    assert reports == []


def test_what_may_be_published_goes_before_what_may_not_and_unknown_likeness_before_none() -> None:
    refused, good = scored(1.0, 0.7), scored(0.8, 0.8)
    assert max(refused, good, key=_worth) is good
    early, late = scored(None, None, 0.9, step=3), scored(None, None, 0.7, step=5)
    assert max(early, late, key=_worth) is late
    assert max(early, scored(None, None, 0.1, step=5), key=_worth) is early


def test_a_candidate_that_draws_nothing_is_dropped(
    open_service: Open, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = dreambooth._judged

    def last_is_lost(*given: Any) -> Any:
        if given[2].stem == str(STEPS):
            raise BadPicture("lost")
        return judged(*given)

    monkeypatch.setattr(dreambooth, "_judged", last_is_lost)
    assert train(open_service(), base_folder, tmp_path / "run").step < STEPS
    monkeypatch.setattr(dreambooth, "_judged", lambda *given: (_ for _ in ()).throw(BadPicture("lost")))
    with pytest.raises(TrainingFailed, match="none of its candidates"):
        train(open_service(), base_folder, tmp_path / "other")
