from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from tests import builders

SMALL = {"prompt": "a knight", "width": 256, "height": 256, "num_inference_steps": 1}


@pytest.fixture
def client(base_folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    model = builders.copy_of(base_folder, tmp_path / "модели" / "ада")
    settings = builders.settings(
        {"default": builders.source(model)}, output_dir=tmp_path / "out", data_dir=tmp_path / "data"
    )
    with TestClient(create_app(settings), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def test_a_model_of_any_name_is_told_in_a_header(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/generate/image", json=SMALL)
    assert answer.status_code == 200
    assert unquote(answer.headers["X-Model-Used"]) == str(tmp_path / "модели" / "ада")


def test_a_prompt_that_was_cut_is_told_in_a_header_without_its_words(client: TestClient) -> None:
    assert "X-Warning" not in client.post("/generate/image", json=SMALL).headers
    long = "画 zebra finch " * 60
    answer = client.post("/generate/image", json={**SMALL, "prompt": long, "negative_prompt": long})
    assert "too long to be read whole" in answer.headers["X-Warning"]
    assert "zebra" not in str(answer.headers)
    [prompt, negative_prompt] = client.get(f"/jobs/{answer.headers['X-Job-Id']}").json()["warnings"]
    assert prompt.startswith("The prompt is too long")
    assert negative_prompt.startswith("The negative prompt is too long")


def test_a_path_with_a_slash_too_many_is_not_found(client: TestClient) -> None:
    answer = client.post("/generate/", json=SMALL, follow_redirects=False)
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
