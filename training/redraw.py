"""Latents as the UNet leaves them, to train the decoder on: half noised, then denoised again in a few steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.captions import caption
from training.common import autocast
from training.text import tokens
from training.unet import GUIDANCE, Denoising
from training.world import Spec

_EARLIEST, _LATEST = 60, 320  # of 1000: late enough to change the latents, early enough to keep the picture


@dataclass(frozen=True)
class Redraw:
    unet: UNet2DConditionModel
    text: CLIPTextModel
    tokenizer: CLIPTokenizer
    denoising: Denoising
    rng: Random

    @torch.no_grad()
    def __call__(self, latents: Tensor, spec: Spec) -> Tensor:
        """(1, channels, rows, columns) to the same, by three DDIM steps; in half of the calls only a little noise."""
        if self.rng.random() < 0.5:
            return latents + 0.15 * self.rng.random() * torch.randn_like(latents)
        start = self.rng.randint(_EARLIEST, _LATEST)
        kept = self.denoising.scheduler.alphas_cumprod
        with autocast():
            states = self.text(tokens(self.tokenizer, ["", caption(spec, self.rng).text])).last_hidden_state
            noise = torch.randn_like(latents)
            x = kept[start].sqrt() * latents + (1 - kept[start]).sqrt() * noise
            for now, after in pairwise((start, start * 2 // 3, start // 3, 0)):
                wordless, worded = self.unet(x.repeat(2, 1, 1, 1), now, states).sample.float().chunk(2)
                velocity = wordless + GUIDANCE * (worded - wordless)
                clean: Tensor = kept[now].sqrt() * x - (1 - kept[now]).sqrt() * velocity
                noise = (1 - kept[now]).sqrt() * x + kept[now].sqrt() * velocity
                x = kept[after].sqrt() * clean + (1 - kept[after]).sqrt() * noise
        return clean
