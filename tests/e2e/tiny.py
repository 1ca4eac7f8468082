"""Pipelines of the real classes with random weights, small where pictures are large: they draw noise, fast."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tests import builders

LEVELS = 5
VAE = {
    **builders.VAE,
    "block_out_channels": (4, 4, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
}
UNET = {
    **builders.UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SIZE_STEP = 16  # pixels: width and height are multiples of it


def build(folder: Path, seed: int, channels: tuple[int, int] = (8, 16)) -> Path:
    """Writes a pipeline in float16 to `folder`; two seeds differ in the UNet alone."""
    pipeline = builders.pipeline(vae=VAE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**UNET, "block_out_channels": channels})
    pipeline.register_modules(unet=unet)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.half()
    pipeline.save_pretrained(folder)
    return folder
