import copy
import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from api.config import ROOT
from api.engine.preview import LONGER_SIDE, preview


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ROOT / "models" / "demo" / "vae", dtype=torch.float32)


@pytest.mark.parametrize("shift", [None, 0.7])
@torch.no_grad()
def test_a_preview_shows_the_colours_of_the_picture(vae: AutoencoderKL, shift: float | None) -> None:
    vae = copy.copy(vae)  # a map is fitted for each autoencoder
    vae.register_to_config(shift_factor=shift)
    left, right = (0.8, -0.6, -0.6), (-0.7, -0.2, 0.9)
    picture = torch.empty(1, 3, 256, 512)
    picture[..., :256] = torch.tensor(left)[:, None, None]
    picture[..., 256:] = torch.tensor(right)[:, None, None]
    latents = (vae.encode(picture).latent_dist.mean[0] - (shift or 0.0)) * vae.config.scaling_factor
    jpeg = Image.open(io.BytesIO(preview(latents, vae)))
    assert jpeg.format == "JPEG"
    assert jpeg.size == (LONGER_SIDE, LONGER_SIDE // 2)
    pixels = np.asarray(jpeg, float) / 127.5 - 1
    assert np.abs(pixels[32:96, 16:96].mean((0, 1)) - left).max() < 0.15
    assert np.abs(pixels[32:96, 160:240].mean((0, 1)) - right).max() < 0.15
