import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from tests.chaos.stage import SCALE
from training.make import STAGES
from training.portrait import render
from training.sheets import sheet
from training.sitters import reference_specs
from training.world import SITTERS

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(SCALE == 1, reason="two minutes, for what is seldom made anew: `make chaos` runs it")
def test_every_stage_runs_from_nothing(tmp_path: Path) -> None:
    stages = [stage for stage in STAGES if stage != "sheets"]
    command = [
        sys.executable,
        "-m",
        "training.make",
        *stages,
        "--scale",
        "0.0005",
        "--threads",
        "1",
        "--models",
        str(tmp_path / "models"),
        "--work",
        str(tmp_path / "work"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    models = tmp_path / "models"
    assert {path.name for path in models.iterdir()} == {"demo", "sitters", "reader", "evaluation.json"}
    assert (models / "sitters" / "ada" / "pytorch_lora_weights.safetensors").stat().st_size < 2e6
    link = models / "sitters" / "chi" / "vae"
    assert link.is_symlink()
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == (models / "demo" / "vae").resolve()
    report = json.loads((models / "evaluation.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in report["figures"]}
    assert figures["demo_folder"] < 36
    assert 0 <= figures["base_attributes_right"] <= 1
    assert {path.stem for path in (tmp_path / "work").glob("*.done")} == set(stages)


def test_contact_sheet_is_small(tmp_path: Path) -> None:
    specs = reference_specs(SITTERS["bo"]) * 2
    sheet([render(spec) for spec in specs], ["a prompt of some length, with words"] * 12, 4, tmp_path / "sheet.webp")
    assert (tmp_path / "sheet.webp").stat().st_size <= 150_000
