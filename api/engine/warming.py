"""Warming: a compiled UNet meets every size of step before its first request does, on the step loop's own thread.

There its CUDA graphs are recorded, which belong to a thread. A LoRA over the attention layers, where nearly all have
theirs, is among the steps: the first user's changes no module any more, and is copied into a slot.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from api.config import DEFAULT_USER
from api.engine import sampler
from api.engine.adapters import Adapter, LayerDelta
from api.engine.base import Base
from api.engine.batch import Batch
from api.engine.slots import BUCKETS
from api.engine.tasks import Task

RANK = 16  # of the tables that the first users meet; others are compiled for when they come
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def warm(base: Base, batch: Batch, most_rows: int, width: int, height: int) -> None:
    """Runs a step of every size in `BUCKETS` that one of up to `most_rows` is filled up to. Blocks, for minutes.

    Args:
        base: whose UNet is compiled.
        batch: the step loop that will draw with it.
        most_rows: of its steps.
        width: of the pictures that are expected, in cells of latents.
        height: likewise.

    Raises:
        Exception: what the compiler raises.
    """
    nothing = _nothing(base.pipeline.unet)
    try:
        for smaller, rows in pairwise((0, *BUCKETS)):
            if smaller < most_rows:
                batch.join(partial(_task, base, nothing, rows, width, height)).ended.result()
    finally:
        base.drop(nothing)


@torch.inference_mode()
def _task(base: Base, adapter: Adapter, rows: int, width: int, height: int) -> Task:
    unet = base.pipeline.unet
    schedule = sampler.schedule("ddim", dict(base.pipeline.scheduler.config), 1)
    noise = torch.zeros(rows, unet.config.in_channels, height, width)
    return Task(
        model=base.unet,
        adapter=adapter,
        user_id=DEFAULT_USER,
        schedule=schedule,
        state=sampler.start(noise, schedule).to(unet.device),
        text=base.texts.encode("", None).expand(rows, -1, -1).to(base.unet.dtype),
        guidance_scale=1.0,
        guidance_rescale=0.0,
        generators=[],
        alone=True,
    )


def _nothing(unet: nn.Module) -> Adapter:
    """Returns an adapter of rank RANK over the attention layers that changes nothing."""
    layers = {
        name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ATTENTION)
    }
    return Adapter(tuple(LayerDelta("unet", name, *_zeros(layer), scale=1.0) for name, layer in layers.items()))


def _zeros(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return torch.zeros(RANK, layer.in_features), torch.zeros(layer.out_features, RANK)
