from random import Random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("skia", reason="the renderer needs the system's libGL and libEGL", exc_type=ImportError)

from training.autoencoder import CORE_CHANNELS, build, grow, psnr
from training.common import to_pictures, to_tensor
from training.linear_codec import start_linear
from training.portrait import render
from training.world import random_spec


def test_the_linear_start_already_shows_the_picture() -> None:
    model = build(CORE_CHANNELS)
    start_linear(model)
    assert psnr(model, 256, 2) > 15


def test_growing_keeps_the_latents() -> None:
    torch.manual_seed(0)
    core = build(CORE_CHANNELS)
    start_linear(core)
    grown = grow(core)
    picture = to_tensor([render(random_spec(Random(1)), 256)])
    with torch.no_grad():
        small = core.encode(F.avg_pool2d(picture, 2)).latent_dist.mean
        large = grown.encode(picture).latent_dist.mean
    assert torch.allclose(small, large, atol=1e-4)


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    picture = render(random_spec(Random(2)), 64)
    assert (to_pictures(to_tensor([picture]))[0] == picture).all()
