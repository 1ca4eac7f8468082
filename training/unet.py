"""The denoiser: 10 million parameters on 16 x 16 latents of a 512 picture, trained on other shapes as well.

Text reaches it twice, by cross-attention and pooled into the time embedding (`addition_embed_type="text"`, which the
stock pipeline feeds by itself); the second path scales and shifts every residual block.
v-prediction with zero terminal SNR and trailing steps after Lin et al., "Common Diffusion Noise Schedules and Sample
Steps Are Flawed" (arXiv:2305.08891).

A small model in a world of flat colours bears a guidance of 2 to 3; the service's default is 7.5. In the second half of
the training the loss is therefore taken on the guided prediction u + GUIDANCE * (c - u), with u the prediction without
words: guidance 3 then is what no guidance is elsewhere, and 7.5 acts like 2.5. Adapters for this model must be trained
with the same loss.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.autoencoder import LATENT_CHANNELS
from training.captions import caption
from training.common import Pace, autocast, average, descend, load, save, set_rate
from training.latents import NATIVE, Shard, load_shards
from training.text import WIDTH, tokens
from training.world import Spec

NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
GUIDANCE = 3.0
_PLAIN = 0.5  # share of the training before the loss is guided
_NO_CAPTION = 0.1  # share of pictures trained without words, for guidance
_CELLS = 16 * NATIVE[0] * NATIVE[1]  # latent cells in a batch


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=NATIVE[0],
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


@dataclass(frozen=True)
class Words:
    """Text states of a batch of captions."""

    states: Tensor  # (n, tokens, width)
    empty: Tensor  # (1, tokens, width), of no caption
    guidance: Tensor  # (n,), 1 where the caption is empty

    @staticmethod
    def of(captions: list[str], text: CLIPTextModel, tokenizer: CLIPTokenizer, guidance: float = GUIDANCE) -> Words:
        with autocast():
            with torch.no_grad():
                empty = text(tokens(tokenizer, [""])).last_hidden_state
            states = text(tokens(tokenizer, captions)).last_hidden_state
        return Words(states, empty, torch.tensor([guidance if caption else 1.0 for caption in captions]))


@dataclass(frozen=True)
class Denoising:
    """The forward process and its loss."""

    scheduler: DDPMScheduler
    snr: Tensor  # (1000,)

    @staticmethod
    def standard() -> Denoising:
        scheduler = DDPMScheduler(**NOISE)
        kept = scheduler.alphas_cumprod
        return Denoising(scheduler, kept / (1 - kept).clamp(min=1e-8))

    def losses(self, unet: UNet2DConditionModel, latents: Tensor, words: Words) -> Tensor:
        """(n,) weighted errors of the guided prediction at one stratified time each. Low-SNR steps, where attributes
        are decided, keep their full weight; nearly clean ones are damped; the head counts more."""
        n = len(latents)
        times = ((torch.randperm(n) + torch.rand(n)) * 1000 / n).long().clamp(max=999)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, times)
        with autocast():
            guided = unet(noisy, times, words.states).sample.float()
        if words.guidance.max() > 1:
            with torch.no_grad(), autocast():
                wordless = unet(noisy, times, words.empty.expand(n, -1, -1)).sample.float()
            guided = wordless + words.guidance[:, None, None, None] * (guided - wordless)
        weight = head_cells(latents.shape[2], latents.shape[3])
        error = (guided - self.scheduler.get_velocity(latents, noise, times)).square() * weight
        damped: Tensor = (5 / (self.snr[times] + 1)).clamp(max=1) * error.mean((1, 2, 3)) / weight.mean()
        return damped


def head_cells(rows: int, columns: int) -> Tensor:
    """(rows, columns): 10 on eyes and cheeks, 2.5 on the rest of the head, 1 elsewhere. The portrait fills the shorter
    side, at the bottom."""
    short = min(rows, columns)
    top, left = rows - short, (columns - short) / 2
    weight = torch.ones(rows, columns)
    for value, (first, last), (start, end) in ((2.5, (1, 11), (4, 12)), (10.0, (6, 9), (5, 11))):
        weight[
            round(top + short * first / 16) : round(top + short * last / 16),
            round(left + short * start / 16) : round(left + short * end / 16),
        ] = value
    return weight


class Pictures:
    """Batches of latents with their specs; all of one shape each, most of the native one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, Shard] = {}
        self._by_shape: dict[tuple[int, int], tuple[Tensor, list[Spec]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in shards that were written meanwhile."""
        if not load_shards(self._folder, self._shards):
            return
        for shape in {shard.shape for shard in self._shards.values()}:
            own = [shard for shard in self._shards.values() if shard.shape == shape]
            self._by_shape[shape] = (
                torch.cat([shard.latents for shard in own]),
                [spec for shard in own for spec in shard.specs()],
            )

    def __len__(self) -> int:
        return sum(len(specs) for _, specs in self._by_shape.values())

    def batch(self, rng: Random) -> tuple[Tensor, list[Spec]]:
        others = [shape for shape in self._by_shape if shape != NATIVE]
        shape = NATIVE if not others or rng.random() < 0.7 else rng.choice(others)
        size = min(24, max(4, _CELLS // (shape[0] * shape[1])))
        return self.sample(rng, size, shape)

    def sample(self, rng: Random, size: int, shape: tuple[int, int] = NATIVE) -> tuple[Tensor, list[Spec]]:
        latents, specs = self._by_shape[shape]
        chosen = [rng.randrange(len(specs)) for _ in range(size)]
        return latents[chosen].float(), [specs[i] for i in chosen]


@dataclass(frozen=True)
class Trained:
    unet: UNet2DConditionModel
    text: CLIPTextModel


def train(
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    steps: int,
    minutes: float,
    folder: Path,
    rate: float = 1e-3,
    ema: float = 0.998,
) -> Trained:
    """Train UNet and, more slowly, the text encoder; returns their moving averages. Continues from `folder`/unet.pt."""
    torch.manual_seed(1)
    unet, path, start = build(), folder / "unet.pt", 0
    optimiser = torch.optim.AdamW(
        [{"params": list(unet.parameters()), "base": rate}, {"params": list(text.parameters()), "base": rate / 5}],
        lr=rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
    )
    mean = Trained(copy.deepcopy(unet), copy.deepcopy(text))
    if path.exists():
        state = load(path)
        start = state["step"]
        for part, key in (
            (unet, "unet"),
            (text, "text"),
            (mean.unet, "mean_unet"),
            (mean.text, "mean_text"),
            (optimiser, "optimiser"),
        ):
            part.load_state_dict(state[key])
    rng, denoising, pictures = Random(3 + start), Denoising.standard(), Pictures(folder)
    print(f"unet: {sum(p.numel() for p in unet.parameters()):,} parameters, {len(pictures)} pictures", flush=True)
    saved = time.monotonic()
    for step in (pace := Pace("unet", steps, minutes, start)):
        set_rate(optimiser, pace.rate(warmup=60, flat=0.3))
        latents, specs = pictures.batch(rng)
        words = ["" if rng.random() < _NO_CAPTION else caption(spec, rng).text for spec in specs]
        guidance = 1.0 if pace.progress < _PLAIN else GUIDANCE
        loss = denoising.losses(unet, latents, Words.of(words, text, tokenizer, guidance)).mean()
        descend(loss, optimiser)
        decay = min(ema, (1 + step) / (10 + step))
        average(mean.unet, unet, decay)
        average(mean.text, text, decay)
        native = latents.shape[2:] == NATIVE
        pace.note(100, **{"loss": loss.item() if native else float("nan")})
        if step % 100 == 0:
            pictures.refresh()
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            save(path, step=step, unet=unet, text=text, mean_unet=mean.unet, mean_text=mean.text, optimiser=optimiser)
    save(path, step=pace.step, unet=unet, text=text, mean_unet=mean.unet, mean_text=mean.text, optimiser=optimiser)
    return mean
