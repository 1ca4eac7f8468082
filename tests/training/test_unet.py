from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.common import Pace, load, save
from training.latents import plan
from training.unet import GUIDANCE, Denoising, Words, head_cells


class Echo(nn.Module):
    """Stands for a UNet: predicts the mean of its words everywhere."""

    def forward(self, noisy: Tensor, times: Tensor, states: Tensor) -> "Echo":
        self.sample = states.mean((1, 2))[:, None, None, None].expand_as(noisy)
        return self


def _losses(guidance: float, predicted: float) -> Tensor:
    torch.manual_seed(0)
    words = Words(torch.full((4, 3, 2), predicted), torch.zeros(1, 3, 2), torch.full((4,), guidance))
    return Denoising.standard().losses(Echo(), torch.randn(4, 16, 8, 8), words)


def test_the_loss_is_taken_on_the_guided_prediction() -> None:
    assert torch.allclose(_losses(GUIDANCE, 0.5), _losses(1.0, 0.5 * GUIDANCE), rtol=1e-2)


def test_the_last_step_is_pure_noise() -> None:
    denoising = Denoising.standard()
    assert denoising.snr[-1] < 1e-6
    assert (denoising.snr.diff() <= 0).all()


def test_the_head_stands_at_the_bottom_of_a_tall_picture() -> None:
    square, tall = head_cells(16, 16), head_cells(32, 16)
    assert torch.equal(tall[16:], square)
    assert (tall[:16] == 1).all()
    wide = head_cells(16, 32)
    assert torch.equal(wide[:, 8:24], square)


def test_most_planned_pictures_are_of_the_native_shape() -> None:
    shards = list(plan(14_000))
    native = sum(count for shape, count in shards if shape == (16, 16))
    assert native == 14_000
    assert len({shape for shape, _ in shards}) > 10


def test_a_stage_paces_itself_by_steps() -> None:
    pace = Pace("test", 10, float("inf"))
    rates = [pace.rate(warmup=2) for _ in pace]
    assert len(rates) == 10
    assert max(rates) > 0.9
    assert rates[-1] < 0.1


def test_a_stage_continues_where_it_stopped() -> None:
    assert list(Pace("test", 5, float("inf"), start=3)) == [4, 5]


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    save(tmp_path / "a.pt", layer=layer, step=3)
    state = load(tmp_path / "a.pt")
    assert state["step"] == 3
    assert torch.equal(state["layer"]["weight"], layer.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
