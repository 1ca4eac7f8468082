"""A whole training of all weights on a tiny base: killed, drawn, and what is left of it on the disk."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from api.engine import candidates, dreambooth
from api.engine.base import Base
from api.engine.dreambooth import SAMPLES, Report
from api.engine.sources import FoundBase
from api.engine.trainer import Trainer
from api.errors import InvalidRequest, ModelUnavailable
from api.model_service import ModelService
from tests import builders, families
from tests.engine.test_dreambooth import LEAST_DB, LESSON, STEPS, Killed, Open, drawn, psnr, train
from tests.engine.test_dreambooth import open_service as open_service  # noqa: PLC0414 - a fixture
from tests.engine.test_dreambooth import quick as quick  # noqa: PLC0414 - a fixture

FULL = replace(LESSON, kind="full", rank=None)
RATE = 1e-3


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> Path:
    """A base of which a few steps make another."""
    folder = builders.copy_of(base_folder, tmp_path / "learner")
    said = {"_training_full_rate": RATE, "_training_rate": 7.0}
    builders.edit_json(folder / "scheduler/scheduler_config.json", lambda config: config.update(said))
    return folder


def sha256(folder: Path) -> str:
    """Of all files of a whole model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("texts", [False, True])
def test_its_folder_draws_what_the_trained_copy_draws(
    open_service: Open, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: bool
) -> None:
    """To the last bit, once that is in float16; and it is not far from that before."""
    trainers = list[Trainer]()
    monkeypatch.setattr(
        dreambooth,
        "Trainer",
        lambda *given: trainers.append(Trainer(*given)) or trainers[-1],  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(dreambooth, "CANDIDATES", (1.0,))
    trained = train(open_service(), base, tmp_path / "run", lesson=replace(FULL, train_text_encoder=texts))
    assert (trained.step, trained.recipe.rate, trained.recipe.rank) == (STEPS, RATE, None)
    ours = ModelService(builders.settings({"default": builders.source(base), "ada": builders.source(trained.file)}))
    try:
        pixels = {user: drawn(ours, user) for user in ("default", "ada")}
        with ours.lease(builders.source(base)) as model:
            assert isinstance(model.base, Base)
            pipeline = model.base.pipeline
            for name, module in trainers[0].learned.modules.items():
                getattr(pipeline, name).load_state_dict(module.state_dict())
            model.base.texts._known.clear()  # it remembers what it read before
            pixels["copy"] = drawn(ours, "default")
            for name in trainers[0].learned.modules:
                getattr(pipeline, name).half().float()
            model.base.texts._known.clear()
            pixels["half"] = drawn(ours, "default")
        lane = ours.generate(builders.request(user_id="ada")).lane
    finally:
        ours.close()
    assert lane == "exact"
    assert (pixels["ada"] == pixels["half"]).all()
    assert psnr(pixels["ada"], pixels["copy"]) > LEAST_DB > psnr(pixels["ada"], pixels["default"])


@pytest.mark.parametrize(("step", "texts"), [(1, False), (3, False), (4, True)])
def test_killed_at_any_step_it_goes_on_to_the_same_end(
    open_service: Open, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, texts: bool
) -> None:
    monkeypatch.setattr("api.engine.dreambooth._Saving.is_due", lambda saving: True)
    lesson = replace(FULL, train_text_encoder=texts)
    whole = train(open_service(), base, tmp_path / "whole", lesson=lesson)

    def kill(report: Report) -> None:
        if report.phase == "training" and report.done == step:
            raise Killed

    with pytest.raises(Killed):
        train(open_service(), base, tmp_path / "killed", kill, lesson)
    again = train(open_service(), base, tmp_path / "killed", lesson=lesson)
    assert (again.step, sha256(again.file)) == (whole.step, sha256(whole.file))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_of_its_candidates_the_best_alone_is_kept(
    open_service: Open, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also where it is killed after any of them, and begun again."""
    monkeypatch.setattr(dreambooth, "_worth", lambda candidate: candidate.step == 4)
    lesson, most = replace(FULL, kind=kind), 0  # type: ignore[arg-type]

    def there() -> list[str]:
        return sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != "state.safetensors")

    def watch(kill_at: int | None, report: Report) -> None:
        nonlocal most
        most = max(most, len(there()))
        if report.phase == "training" and report.done == kill_at:
            raise Killed

    for kill_at in (4, 5):
        with pytest.raises(Killed):
            train(open_service(), base, tmp_path / "run", partial(watch, kill_at), lesson)
    trained = train(open_service(), base, tmp_path / "run", partial(watch, None), lesson)
    assert trained.step == 4
    assert there() == [trained.file.name]
    assert most == 2


def test_its_memory_is_reserved_as_a_models(open_service: Open, base: Path, tmp_path: Path) -> None:
    service, used = open_service(), list[int]()
    with service.lease(builders.source(base)) as model:
        weights = sum(weight.numel() for weight in model.base.pipeline.unet.parameters())
        alone = service.cache.used("cpu")

    def note(report: Report) -> None:
        used.append(service.cache.used("cpu") - alone)
        service.cache.check()

    train(service, base, tmp_path / "run", note, FULL)
    assert set(used) == {16 * weights}
    assert service.cache.used("cpu") == alone


def test_what_has_no_room_is_not_begun(base: Path, tmp_path: Path) -> None:
    with_model = ModelService(builders.settings({"default": builders.source(base)}))
    with with_model.lease(builders.source(base)) as model:
        weights = sum(weight.numel() for weight in model.base.pipeline.unet.parameters())
    with_model.close()
    little = builders.settings({"default": builders.source(base)}, host_cache_gb=15 * weights / 1e9)
    service = ModelService(little)
    try:
        with pytest.raises(ModelUnavailable, match="the cache may take"):
            train(service, base, tmp_path / "run", lesson=FULL)
    finally:
        service.close()


def test_a_base_that_is_one_file_is_refused(base: Path, tmp_path: Path) -> None:
    file = builders.single_file(base, tmp_path / "base.safetensors")
    source = builders.source(file, config=str(base))
    service = ModelService(builders.settings({"default": source}))
    try:
        with pytest.raises(InvalidRequest, match="single file"):
            service.train(source, FULL, tmp_path, lambda report: None)
    finally:
        service.close()


def test_over_stable_diffusion_xl_a_whole_model_is_learned(open_service: Open, tmp_path: Path) -> None:
    base = families.save("sdxl", tmp_path / "sdxl")
    builders.edit_json(base / "scheduler/scheduler_config.json", lambda config: config.update(_training_full_rate=RATE))
    trained = train(open_service(), base, tmp_path / "run", lesson=FULL)
    assert len(trained.samples) == SAMPLES
    ours = ModelService(builders.settings({"default": builders.source(base), "ada": builders.source(trained.file)}))
    try:
        assert psnr(drawn(ours, "ada"), drawn(ours, "default")) < LEAST_DB
    finally:
        ours.close()


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    folder = families.save("sd3", tmp_path / "sd3")
    service = ModelService(builders.settings({"default": builders.source(folder)}))
    try:
        with pytest.raises(ModelUnavailable, match="cannot be trained"):
            train(service, folder, tmp_path / "run", lesson=FULL)
    finally:
        service.close()


def test_what_is_not_whole_does_not_count(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies while a folder is written leaves none, and the next one is not disturbed."""
    found = FoundBase("base", base_folder)
    tensors = {"unet.x": torch.ones(2)}

    def full(file: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(candidates, "sync_file", full)
        with pytest.raises(OSError, match="No space"):
            candidates.save_model(found, tensors, tmp_path / "5")
    assert not (tmp_path / "5").exists()
    candidates.save_model(found, tensors, tmp_path / "5")
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
