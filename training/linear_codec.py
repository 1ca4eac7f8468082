"""Start an AutoencoderKL as an exact linear codec instead of from noise: it stands at about 18 dB before the
first step.

The encoder takes Haar coefficients: each level halves the picture, the last one also keeps the details. The decoder
shows the low-pass picture, smoothly enlarged. All residual branches start at zero. Group norms and SiLUs in front of
the output layers would bend the signal; a coefficient x therefore travels as the pair (x, -x) beside two constant
channels +K and -K, which fix the norm's statistics, and silu(x) - silu(-x) = x gives it back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

_K = 4.0
_BANDS = torch.tensor([[[1.0, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]])
_COEFFICIENTS = 12  # four Haar bands of three colours
_COEFFICIENT_VARIANCE, _COLOUR_VARIANCE = 0.15, 0.2  # of the signal in the group norm that it must pass


@torch.no_grad()
def start_linear(model: AutoencoderKL) -> None:
    silence_branches(model)
    _start_encoder(model)
    _start_decoder(model)


@torch.no_grad()
def silence_branches(model: nn.Module) -> None:
    """Every residual branch starts at zero."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()


@torch.no_grad()
def pass_through(conv: Any, channels: int, rest: float) -> None:
    """The first `channels` are copied; the others keep their random weights, scaled by `rest`."""
    centre = conv.weight.shape[-1] // 2
    conv.weight[:channels] = 0
    conv.weight[channels:] *= rest
    conv.bias[:channels] = 0
    for i in range(channels):
        conv.weight[i, i, centre, centre] = 1


def _add_mirror(conv: Any, channels: int) -> None:
    """Channels n..2n-1 become the negatives of 0..n-1, and the next two the constants +K and -K."""
    centre = conv.weight.shape[-1] // 2
    for i in range(channels):
        conv.weight[channels + i] = 0
        conv.bias[channels + i] = 0
        conv.weight[channels + i, i, centre, centre] = -1
    conv.weight[2 * channels : 2 * channels + 2] = 0
    conv.bias[2 * channels], conv.bias[2 * channels + 1] = _K, -_K


def _read_mirror(conv: Any, norm: nn.GroupNorm, sources: int, outputs: int, variance: float) -> None:
    scale = math.sqrt(2 * _K * _K / (norm.num_channels // norm.num_groups) + variance)
    conv.weight *= 0.1
    conv.bias.zero_()
    for i in range(outputs):
        conv.weight[i] = 0
        conv.weight[i, i, 1, 1] = scale
        conv.weight[i, sources + i, 1, 1] = -scale


def _start_encoder(model: AutoencoderKL) -> None:
    encoder, last = model.encoder, len(model.encoder.down_blocks) - 1
    # A 1x1 map, kept fixed: `autoencoder.grow` can then put an exact halving in front of it.
    encoder.conv_in.weight.copy_(_centre_tap(encoder.conv_in.weight))
    pass_through(encoder.conv_in, 3, 1.0)
    for level, block in enumerate(encoder.down_blocks):
        if (shortcut := block.resnets[0].conv_shortcut) is not None:
            pass_through(shortcut, _COEFFICIENTS if level == last else 3, 0.5)
        if block.downsamplers:
            conv = block.downsamplers[0].conv
            conv.bias.zero_()
            kept = _COEFFICIENTS if conv.weight.shape[0] >= _COEFFICIENTS else 3
            conv.weight[:kept] = 0
            conv.weight[kept:] *= 0.5
            for i in range(kept):
                band, colour = divmod(i, 3)
                conv.weight[i, colour, :2, :2] = _BANDS[band] * (0.25 if band == 0 else 0.5)
    _add_mirror(encoder.down_blocks[last].resnets[0].conv_shortcut, _COEFFICIENTS)
    channels = model.config.latent_channels
    _read_mirror(encoder.conv_out, encoder.conv_norm_out, _COEFFICIENTS, _COEFFICIENTS, _COEFFICIENT_VARIANCE)
    quant, post = model.quant_conv, model.post_quant_conv
    eye = torch.eye(channels)[:, :, None, None]
    quant.weight[:channels] = torch.cat([1.5 * eye, torch.zeros_like(eye)], dim=1)
    quant.weight[channels:] *= 0.05
    quant.bias[:channels], quant.bias[channels:] = 0, -5.0  # log variance
    post.weight.copy_(eye / 1.5)
    post.bias.zero_()


def _centre_tap(weight: Tensor) -> Tensor:
    """A 3x3 kernel that looks at its own pixel only, as loud as the random one it replaces."""
    kernel = torch.zeros_like(weight)
    kernel[:, :, 1, 1] = weight[:, :, 1, 1] * 3
    return kernel


def _start_decoder(model: AutoencoderKL) -> None:
    decoder = model.decoder
    pass_through(decoder.conv_in, _COEFFICIENTS, 0.7)
    smooth = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for level, block in enumerate(decoder.up_blocks):
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                pass_through(resnet.conv_shortcut, 3 if level else _COEFFICIENTS, 0.7)
        if block.upsamplers:
            conv = block.upsamplers[0].conv
            conv.bias.zero_()
            conv.weight[:3] = 0
            conv.weight[3:] *= 0.7
            for i in range(3):
                conv.weight[i, i] = smooth
    _add_mirror(decoder.up_blocks[-1].resnets[0].conv_shortcut, 3)
    _read_mirror(decoder.conv_out, decoder.conv_norm_out, 3, 3, _COLOUR_VARIANCE)
