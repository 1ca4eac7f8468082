"""A whole model, from pictures sent to a real server to one that draws, is taken along, sent back, and erased."""

import io
import zipfile
from pathlib import Path

from tests.e2e.pictures import pixels_of
from tests.e2e.server import Server
from tests.forms import FORM, GOOD, archive, pictures

WHOLE = {**FORM, "name": "eve", "user_id": "eve", "kind": "full", "steps": "3", "prior_preservation": "false"}


def test_a_whole_model_is_trained_drawn_with_taken_along_and_erased(models: Path, tmp_path: Path) -> None:
    base = str(models / "one")
    with Server(tmp_path, {"default": base}, FULL_TRAINING="true") as server:
        client = server.client
        accepted = client.post("/trainings", data=WHOLE, files=pictures(*GOOD))
        assert accepted.status_code == 202, accepted.text
        job = accepted.json()["id"]
        client.get(f"/jobs/{job}/events")  # until it has ended
        ended = server.get(f"/jobs/{job}")
        assert ended["status"] == "succeeded", ended
        [model, *_] = server.get("/models?user_id=eve")["models"]
        here = f"/models/{model['id']}"
        [version] = server.get(f"{here}/versions")["versions"]
        assert (version["kind"], version["base"], version["parameters"]["rank"]) == ("full", base, None)
        assert all(client.get(sample).content.startswith(b"\x89PNG") for sample in version["samples"])
        client.post(f"{here}/versions/1/publish").raise_for_status()
        drawn = server.drawn(user_id="eve", seed=1)
        assert drawn["model_id"] == "eve/eve@1"
        plain = server.drawn(user_id="dora", seed=1)
        taken = client.get(f"{here}/file").raise_for_status()
        with zipfile.ZipFile(io.BytesIO(taken.content)) as opened:
            assert set(opened.namelist()) == version["files"].keys() - {
                path.rsplit("/")[-1] for path in version["samples"]
            }
        back = client.post("/models", data={**FORM, "user_id": "cleo"}, files=archive(taken.content))
        assert back.status_code == 201, back.text
        again = server.drawn(user_id="cleo", seed=1)
        assert pixels_of(again) == pixels_of(drawn) != pixels_of(plain)
        assert client.delete(here).status_code == 204
        assert len(list((tmp_path / "data/models").iterdir())) == 1  # Cleo's
        assert server.drawn(user_id="eve", seed=1)["model_id"] == base
