"""Previews: a rough picture from latents by one linear map, far cheaper than the decoder.

The map is fitted once per autoencoder, on patches of colour: nearly all of what a latent cell says about its mean
colour is linear. Others fit it by hand (https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204).
"""

import io
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

PICTURES = 4
PATCHES = 4  # along each side of a picture
LONGER_SIDE = 256  # pixels of a preview
QUALITY = 70

_maps: WeakKeyDictionary[AutoencoderKL, Tensor] = WeakKeyDictionary()
_fitting = threading.Lock()


def preview(latents: Tensor, vae: AutoencoderKL) -> bytes:
    """Returns a small JPEG of `latents` (channels, h, w), as the pipeline keeps them."""
    to_rgb = fitted(vae)
    cells = torch.cat([latents, torch.ones_like(latents[:1])]).to("cpu", torch.float32)
    rgb = torch.einsum("chw,cr->hwr", cells, to_rgb)
    pixels = ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    scale = LONGER_SIDE / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


def shows(latents: Tensor, vae: Any) -> bool:
    """Whether `preview` can tell from `latents` (pictures, channels, h, w) what they look like.

    Not of those packed into patches, scaled channel by channel, or of another autoencoder; nor where the autoencoder
    leaves the range of its own precision.
    """
    if not isinstance(vae, AutoencoderKL) or getattr(vae.config, "latents_mean", None) is not None:
        return False
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    return latents.dim() == 4 and latents.shape[1] == vae.config.latent_channels and not overflows


def fitted(vae: AutoencoderKL) -> Tensor:
    """Returns the map of `vae`, (channels + 1, 3) with the constant last, fitting it the first time."""
    if (known := _maps.get(vae)) is not None:  # without a wait for whoever fits another
        return known
    with _fitting:
        if vae not in _maps:
            _maps[vae] = _fit(vae)
        return _maps[vae]


@torch.no_grad()
def _fit(vae: AutoencoderKL) -> Tensor:
    """Least squares from the latents of colour patches to their mean colours in [-1, 1]."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    colours = torch.rand(PICTURES, 3, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = interpolate(colours, scale_factor=2.0 * factor, mode="nearest")
    latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean
    encoded = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    cells = encoded.float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    known = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    wanted = interpolate(colours, scale_factor=2.0, mode="nearest").permute(0, 2, 3, 1).flatten(0, 2)
    fitted: Tensor = torch.linalg.lstsq(known, wanted).solution
    return fitted
