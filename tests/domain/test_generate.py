import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.domain.generate import generate
from api.errors import ModelUnavailable
from api.model_service import ModelService
from api.store.files import PictureFolder
from tests import builders


@pytest.fixture(scope="module")
def models(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelService]:
    users = {"default": builders.source(base_folder), "eve": builders.source("/nowhere")}
    service = ModelService(builders.settings(users))
    yield service
    service.close()


def test_the_answer_is_what_is_on_the_disk(models: ModelService, tmp_path: Path, base_folder: Path) -> None:
    request = builders.request(user_id="user_123", num_images=3, seed=9)
    generated = generate(request, models, PictureFolder(tmp_path))
    answer = generated.response
    assert (answer.success, answer.message) == (True, "Image generated successfully")
    assert answer.model_id == str(base_folder)
    assert [image.seed for image in answer.images] == [9, 10, 11]
    for image in answer.images:
        path = Path(image.image_path)
        assert re.fullmatch(r"user_123_\d{8}_\d{6}(_\d)?\.png", path.name)
        assert image.image_id == path.stem
        assert base64.b64decode(image.image_base64) == path.read_bytes()
    first = answer.images[0]
    assert first.model_dump() == answer.model_dump(include=set(first.model_dump()))
    assert generated.png == Path(answer.image_path).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {Path(image.image_path).name for image in answer.images}


def test_what_was_not_read_is_told(models: ModelService, tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    short = generate(builders.request(negative_prompt="a hat"), models, folder)
    assert (short.response.warnings, short.cut) == ([], [])
    long = generate(builders.request(negative_prompt="word " * 60 + "zebra finch"), models, folder)
    [warning] = long.response.warnings
    assert warning.startswith("The negative prompt is too long")
    assert 'zebra finch"' in warning
    assert long.cut == ["negative_prompt"]


def test_the_cache_is_told(models: ModelService, tmp_path: Path) -> None:
    models.clear_cache()
    answers = [generate(builders.request(), models, PictureFolder(tmp_path)).response for _ in range(2)]
    assert [answer.cache for answer in answers] == ["miss", "hit"]
    spent = answers[0].timings
    assert answers[0].generation_time >= spent.load + spent.denoise + spent.decode - 0.001  # it is rounded


def test_nothing_is_saved_when_nothing_is_drawn(models: ModelService, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable):
        generate(builders.request(user_id="eve"), models, PictureFolder(tmp_path / "output"))
    assert not (tmp_path / "output").exists()
