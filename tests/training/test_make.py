import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_stage_runs_from_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.make", "--scale", "0.0005", "--threads", "1", "--models",
               str(tmp_path / "models"), "--work", str(tmp_path / "work"), "--docs", str(tmp_path / "docs")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
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
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"base.webp", "sitters.webp"}
    again = subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True, text=True)
    assert again.stdout.count("done before") == 11
