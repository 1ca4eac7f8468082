"""Counting faces, by a detector that really finds them."""

import gc
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import YolosForObjectDetection

from api.engine.faces import Detector, distinct, labels_of, load_detector
from api.errors import Cancelled, ModelUnavailable
from api.model_service import ModelService
from tests import builders
from tests.seers import MOST_FACES, scene

SEEDS = range(1000, 1010)  # of scenes that it has not learned from


def png(faces: int, seed: int, width: int = 512, height: int = 256) -> bytes:
    buffer = io.BytesIO()
    scene(faces, seed, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def in_memory() -> int:
    """How many detectors there are."""
    return sum(type(one) is YolosForObjectDetection for one in gc.get_objects())


@pytest.fixture(scope="module")
def loaded(detector: Path) -> Detector:
    return load_detector(detector, "cpu")


@pytest.mark.parametrize("faces", range(MOST_FACES))
def test_one_face_is_told_from_none_and_from_two(loaded: Detector, faces: int) -> None:
    assert [loaded.count(png(faces, seed)) for seed in SEEDS] == [faces] * len(SEEDS)


def test_more_faces_are_never_one(loaded: Detector) -> None:
    assert min(loaded.count(png(MOST_FACES, seed)) for seed in SEEDS) > 1


@pytest.mark.parametrize(("width", "height"), [(300, 600), (1024, 1024)])
def test_a_photo_of_any_shape_is_looked_at(loaded: Detector, width: int, height: int) -> None:
    assert loaded.count(png(1, SEEDS[0], width, height)) == 1
    assert loaded.count(png(0, SEEDS[0], width, height)) == 0


def test_boxes_of_the_same_face_count_once() -> None:
    boxes = torch.tensor([[0.0, 0, 100, 100], [10, 5, 105, 100], [60, 0, 160, 100], [300, 0, 310, 10]])
    assert [box.tolist() for box in distinct(list(boxes))] == [boxes[at].tolist() for at in (0, 2, 3)]
    assert distinct([]) == []


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ({0: "face"}, {0}),
        ({0: "Human face", 1: "Person", 2: "Human faces"}, {0, 2}),
        ({0: "N/A", 1: "person", 2: "bicycle"}, {1}),
        ({0: "surface", 1: "LABEL_0"}, set()),
    ],
)
def test_labels_that_count_are_those_of_faces_or_else_of_people(names: dict[int, str], labels: set[int]) -> None:
    assert labels_of(names) == labels


def test_a_folder_that_is_no_detector_is_told(detector: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable):
        load_detector(encoder, "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable) as caught:
        load_detector(tmp_path / "empty", "cpu")
    assert caught.value.hint == "Check FACE_DETECTOR."
    of_cats = builders.copy_of(detector, tmp_path / "cats")
    builders.edit_json(of_cats / "config.json", lambda config: config.update(id2label={"0": "cat"}))
    with pytest.raises(ModelUnavailable, match="names neither faces nor people"):
        load_detector(of_cats, "cpu")


def test_weights_that_are_not_whole_or_pickled_do_not_load(detector: Path, tmp_path: Path) -> None:
    lacking = builders.copy_of(detector, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["bbox_predictor.layers.0.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="has no bbox_predictor"):
        load_detector(lacking, "cpu")
    cut = builders.copy_of(detector, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match="does not load"):
        load_detector(cut, "cpu")
    pickled = builders.copy_of(detector, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable):
        load_detector(pickled, "cpu")


def test_code_that_comes_with_a_model_is_not_run(detector: Path, tmp_path: Path) -> None:
    strange = builders.copy_of(detector, tmp_path / "strange")
    (strange / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoModelForObjectDetection": "code.Anything", "AutoImageProcessor": "code.Anything"}
    for file in ("config.json", "preprocessor_config.json"):
        builders.edit_json(strange / file, lambda config: config.update(auto_map=code))
    assert load_detector(strange, "cpu").count(png(1, SEEDS[0])) == 1  # the library's own class of that name
    builders.edit_json(strange / "config.json", lambda config: config.update(model_type="strange"))
    with pytest.raises(ModelUnavailable):  # nor is anybody asked whether it may be
        load_detector(strange, "cpu")
    assert not (tmp_path / "ran").exists()


def test_photos_are_counted_in_a_service_and_the_detector_goes(base_folder: Path, detector: Path) -> None:
    sources = {"default": builders.source(base_folder)}
    service = ModelService(builders.settings(sources, face_detector=detector))
    try:
        assert service.engine.device == "cpu"  # it has started: what was there before is not counted any more
        before = in_memory()
        assert service.counts_faces
        assert service.count_faces([png(count, SEEDS[0]) for count in (1, 0, 2)]) == [1, 0, 2]
        gc.collect()
        assert in_memory() == before

        def cancelled() -> None:
            raise Cancelled("enough")

        with pytest.raises(Cancelled):
            service.count_faces([png(1, SEEDS[0])], cancelled)
    finally:
        service.close()
