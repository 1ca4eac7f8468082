"""The parts together as a stock StableDiffusionPipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_log
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_log

from training.unet import GUIDANCE, NOISE

# Private keys of the scheduler's configuration, which diffusers keeps: whoever calls the pipeline passes the first as
# its `guidance_rescale`, whoever trains an adapter takes the loss at the second (see unet.py), and whoever wants
# another size draws with the third as the shorter side and scales the picture. The others are how sitters of it are
# trained: the learning rate, the steps, and the pictures of the sitter and of the class in a batch.
GUIDANCE_RESCALE = 0.2
SHORTER_SIDE = 512


def make_scheduler() -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(**NOISE, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.register_to_config(
        _guidance_rescale=GUIDANCE_RESCALE,
        _training_guidance=GUIDANCE,
        _shorter_side=SHORTER_SIDE,
        _training_rate=2.5e-3,
        _training_full_rate=2.5e-4,
        _training_steps=160,
        _training_own=6,
        _training_prior=2,
    )
    return scheduler


def assemble(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, folder: Path
) -> None:
    """Write the pipeline in fp16."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)


def open_pipeline(folder: Path) -> StableDiffusionPipeline:
    """In float32, silent."""
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
