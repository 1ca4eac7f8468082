"""A model of another kind than Stable Diffusion answers as every other does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from tests import builders, families

SMALL = {"prompt": "a knight", "width": 256, "height": 256, "num_inference_steps": 1}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    model = builders.source(families.save("lcm", tmp_path / "lcm"))
    settings = builders.settings({"default": model}, output_dir=tmp_path / "out", data_dir=tmp_path / "data")
    with TestClient(create_app(settings), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def test_its_lane_is_told_and_what_it_cannot_do(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/generate", json={**SMALL, "negative_prompt": "a hat"}).json()
    assert (answer["lane"], answer["model_id"]) == ("stock", str(tmp_path / "lcm"))
    [warning] = answer["warnings"]
    assert "takes no negative prompt" in warning
    job = client.get(f"/jobs/{answer['job_id']}").json()
    assert (job["status"], job["warnings"]) == ("succeeded", [warning])
    [cached] = client.get("/cache").json()["models"]
    assert (cached["model_id"], cached["in_use"]) == (str(tmp_path / "lcm"), 0)


def test_its_warning_is_kept_for_a_sensitive_prompt_that_was_cut(client: TestClient) -> None:
    asked = {**SMALL, "prompt": "zebra " * 100, "negative_prompt": "a hat", "sensitive": True}
    answer = client.post("/generate/image", json=asked)
    assert "cannot do all that was asked" in answer.headers["X-Warning"]
    cut, kind = client.get(f"/jobs/{answer.headers['X-Job-Id']}").json()["warnings"]
    assert ("zebra" in cut, "takes no negative prompt" in kind) == (False, True)


@pytest.mark.parametrize(
    ("field", "value", "code"), [("width", 300, "unsupported_size"), ("scheduler", "euler", "invalid_request")]
)
def test_what_does_not_fit_it_is_a_bad_request(client: TestClient, field: str, value: object, code: str) -> None:
    answer = client.post("/generate", json={**SMALL, field: value})
    assert (answer.status_code, answer.json()["error"]) == (422, code)
    assert client.get("/cache").json()["models"] == []
