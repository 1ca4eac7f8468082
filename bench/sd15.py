"""A UNet of Stable Diffusion 1.5's size with random weights: a call as the engine makes it, against plain diffusers."""

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from api.config import load_settings
from api.engine.components import choose_placement
from api.engine.slots import Slots
from bench.figures import Figure, at_least, paired

CELLS = 64  # latents of 512 × 512
ROUNDS = 2


def figures() -> Iterator[Figure]:
    """Seconds a call for one picture with guidance, both ways in turn."""
    placement = choose_placement(load_settings(use_gpu=False))
    plain = UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)
    ours = UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)
    ours.load_state_dict(plain.state_dict())
    engine = Slots(ours.to(placement.dtype).to(memory_format=torch.channels_last), "unet", count=0)
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, CELLS, CELLS), (77, 768)))
    timesteps = torch.full((2,), 500.0)

    @torch.inference_mode()
    def call(unet: UNet2DConditionModel, dtype: torch.dtype) -> Tensor:
        predicted: Tensor = unet(latents.to(dtype), timesteps, encoder_hidden_states=text.to(dtype), return_dict=False)[
            0
        ]
        return predicted.float()

    theirs, mine = call(plain, torch.float32), call(engine.module, engine.dtype)
    yield Figure("the precision of the UNet", placement.dtype.itemsize * 8, "bits")
    yield Figure("its error, of the prediction's spread", float((theirs - mine).std() / theirs.std()), "ratio")
    ours_seconds, plain_seconds, ratio = paired(
        lambda: call(engine.module, engine.dtype), lambda: call(plain, torch.float32), ROUNDS
    )
    yield Figure("a UNet call, plain diffusers in float32", plain_seconds, "s")
    yield Figure("a UNet call, the engine's", ours_seconds, "s")
    yield at_least("sd15_cpu_speedup", ratio, "ratio", 2.0)
