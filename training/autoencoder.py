"""The autoencoder, in three stages that leave the latents of the first one as they are.

1. `train_core`: 16 pixels a cell, on pictures of 256 pixels.
2. `grow`: one more outer level, 32 pixels a cell. Its encoder halves the picture exactly, so a 512 picture has the
   latents of its half; the decoder learns to draw the finer edges.
3. `sharpen`: the whole decoder, on the latents of renders as a UNet would leave them, so that it mends its flaws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.common import Pace, autocast, descend, save, set_rate, to_tensor
from training.linear_codec import pass_through, silence_branches, start_linear
from training.portrait import render
from training.world import Spec, held_out_spec, random_spec

LATENT_CHANNELS = 16
CORE_CHANNELS = (16, 48, 96, 128, 160)
OUTER_CHANNELS = 16
_CROP = 128
_HEAD = (0.42, 0.5)  # where the head is, from the top and the left, in shares of the shorter side


def build(channels: tuple[int, ...]) -> AutoencoderKL:
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        sample_size=2 ** (levels + 3),
    )


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the gradients."""
    d = a - b
    return d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def _loss(drawn: Tensor, truth: Tensor, weight: Tensor | float) -> Tensor:
    error = (drawn - truth) * weight
    return error.abs().mean() + 0.5 * _edges(drawn, truth) + 0.5 * F.avg_pool2d(error, 8).abs().mean()


def head_weight(size: int) -> Tensor:
    """(size, size): 2.5 on head and hair, 1 elsewhere."""
    weight = torch.ones(size, size)
    weight[size // 16 : size * 11 // 16, size // 4 : size * 3 // 4] = 2.5
    return weight


def _crop(picture: NDArray[np.uint8], side: int, rng: Random) -> NDArray[np.uint8]:
    """A square, mostly about the head."""
    height, width = picture.shape[:2]
    short = min(height, width)

    def start(room: int, centre: float) -> int:
        return int(min(max(rng.gauss(centre - side / 2, 0.16 * short), 0), room - side))

    top = start(height, height - short + _HEAD[0] * short)
    left = start(width, width / 2)
    return picture[top : top + side, left : left + side]


def _crops(rng: Random, count: int) -> Tensor:
    """Crops at mixed zoom: portraits of 128 to 512 pixels, most of them 256."""
    sizes = [256 if rng.random() < 0.7 else rng.choice((128, 160, 192, 320, 384, 512)) for _ in range(count)]
    return to_tensor([_crop(render(random_spec(rng), size), _CROP, rng) for size in sizes])


def train_core(steps: int, minutes: float, folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    rng, model = Random(77), build(CORE_CHANNELS)
    start_linear(model)
    model.encoder.conv_in.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([{"params": trained, "base": 8e-4}], lr=8e-4, betas=(0.9, 0.98), weight_decay=1e-4)
    heads = head_weight(256)
    print("core: dB before training", round(psnr(model, 256, 6), 2), flush=True)
    for step in (pace := Pace("core", steps, minutes)):
        set_rate(optimiser, pace.rate())
        whole = pace.progress > 0.5 and step % 2 == 0
        truth = to_tensor([render(random_spec(rng), 256) for _ in range(2)]) if whole else _crops(rng, 6)
        with autocast():
            posterior = model.encode(truth).latent_dist
            drawn = model.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = _loss(drawn, truth, heads if whole else 1.0) + 1e-4 * kl
        descend(loss, optimiser)
        pace.note(50, loss=loss.item(), l1=(drawn - truth).abs().mean().item())
        if step % 300 == 0:
            save(folder / "core.pt", model=model)
            print("core: dB at 256", round(psnr(model, 256, 6), 2), flush=True)
    _normalise(model)
    save(folder / "core.pt", model=model)
    print("core: dB at 256", round(psnr(model, 256, 16), 2), flush=True)
    return model


@torch.no_grad()
def _normalise(model: AutoencoderKL) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions, so that `scaling_factor` is 1."""
    rng = Random(5)
    latents = torch.cat([model.encode(to_tensor([render(random_spec(rng), 256)])).latent_dist.mean for _ in range(96)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post, n = model.quant_conv, model.post_quant_conv, LATENT_CHANNELS
    quant.weight[:n] /= deviation[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) / deviation
    quant.bias[n:] -= 2 * deviation.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]


@torch.no_grad()
def grow(core: AutoencoderKL) -> AutoencoderKL:
    """One more outer level. The grown encoder gives a picture the latents that `core` gives its 2x2 means."""
    model = build((OUTER_CHANNELS, *CORE_CHANNELS))
    silence_branches(model)
    pass_through(model.encoder.conv_in, 3, 0.0)
    model.quant_conv.load_state_dict(core.quant_conv.state_dict())
    model.post_quant_conv.load_state_dict(core.post_quant_conv.state_dict())
    inner = len(CORE_CHANNELS)
    new, old = model.encoder, core.encoder
    for i in range(inner):
        new.down_blocks[i + 1].load_state_dict(old.down_blocks[i].state_dict())
    for part in ("mid_block", "conv_norm_out", "conv_out"):
        getattr(new, part).load_state_dict(getattr(old, part).state_dict())
    halve = new.down_blocks[0].downsamplers[0].conv
    halve.weight.zero_()
    halve.weight[:, :3, :2, :2] = old.conv_in.weight.sum((2, 3))[:, :, None, None] / 4
    halve.bias.copy_(old.conv_in.bias)
    new, old = model.decoder, core.decoder
    for part in ("conv_in", "mid_block", "conv_norm_out", "conv_out"):
        getattr(new, part).load_state_dict(getattr(old, part).state_dict())
    for i in range(inner):
        new.up_blocks[i].load_state_dict(old.up_blocks[i].state_dict(), strict=False)
    enlarge = new.up_blocks[inner - 1].upsamplers[0].conv
    enlarge.weight.zero_()
    enlarge.bias.zero_()
    enlarge.weight[:, :, 1, 1] = torch.eye(OUTER_CHANNELS)
    return model


def sharpen(
    model: AutoencoderKL, spoil: Callable[[Tensor, Spec], Tensor], steps: int, minutes: float, path: Path
) -> AutoencoderKL:
    """Train the decoder alone, on whole pictures whose latents went through `spoil`; returns the moving average."""
    torch.manual_seed(1)
    rng, heads = Random(88), head_weight(512)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    blocks = model.decoder.up_blocks
    fresh = [*blocks[-1].parameters(), *blocks[-2].upsamplers.parameters()]
    known = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in fresh)]
    mean = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(
        [{"params": fresh, "base": 6e-4}, {"params": known, "base": 1.5e-4}], betas=(0.9, 0.99), weight_decay=1e-4
    )
    for step in (pace := Pace("sharpen", steps, minutes)):
        set_rate(optimiser, pace.rate())
        spec = random_spec(rng)
        side = 512 if rng.random() < 0.85 else rng.choice((256, 384, 640))
        truth = to_tensor([render(spec, side)])
        with torch.no_grad(), autocast():
            latents = spoil(model.encode(truth).latent_dist.mean.float(), spec)
        with autocast():
            drawn = model.decode(latents).sample.float()
        loss = _loss(drawn, truth, heads if side == 512 else 1.0)
        descend(loss, optimiser)
        for kept, new in zip(mean.parameters(), model.parameters(), strict=True):
            kept.data.lerp_(new.data, max(0.01, 1 / (step + 1)))
        pace.note(50, loss=loss.item(), l1=(drawn - truth).abs().mean().item())
        if step % 200 == 0:
            save(path, model=mean)
            print("sharpen: dB at 512", round(psnr(mean, 512, 6), 2), flush=True)
    save(path, model=mean)
    return mean


@torch.no_grad()
def psnr(model: AutoencoderKL, size: int, count: int, seed: int = 999) -> float:
    """Mean dB over renders of people who are never drawn in training."""
    rng, total = Random(seed), 0.0
    for _ in range(count):
        truth = to_tensor([render(held_out_spec(rng), size)])
        with autocast():
            drawn = model.decode(model.encode(truth).latent_dist.mean).sample.float().clamp(-1, 1)
        total += -10 * float(((drawn - truth) / 2).square().mean().log10())
    return total / count
