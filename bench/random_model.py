"""A Stable Diffusion 1 with random weights: what it draws is noise, and what that costs is the real thing's."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from api.config import ROOT

TOKENIZER = ROOT / "models" / "demo" / "tokenizer"
BLOCKS = (320, 640, 1280, 1280)  # channels of Stable Diffusion 1.5's UNet
DECODER_BLOCKS = (128, 256, 512, 512)
WORDS = 768  # width of its text encoder
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_model(folder: Path, seed: int, shrink: int = 1) -> Path:
    """Writes a pipeline in float16 and returns its folder.

    Args:
        folder: where to.
        seed: other weights for each.
        shrink: divides every width; 1 is Stable Diffusion 1.5, 5 is for trying a bench out.
    """
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    width = WORDS // shrink // 12 * 12
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=tuple(max(32, size // shrink // 32 * 32) for size in DECODER_BLOCKS),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            block_out_channels=tuple(size // shrink // 32 * 32 for size in BLOCKS), cross_attention_dim=width
        ),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder
