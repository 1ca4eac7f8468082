"""Users over one base who wish for pictures: tasks for the batch, and what each is when it is drawn alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from api.engine import sampler
from api.engine.adapters import Adapter, LayerDelta
from api.engine.base import Base
from api.engine.sampler import SAMPLERS
from api.engine.tasks import OnCall, Task
from tests import builders

NOBODY = "nobody"  # a user without an adapter


@dataclass(frozen=True)
class Wish:
    """What a user wants drawn; 64 pixels are 8 cells of the latents."""

    user: str
    prompt: str = "sks person as a knight"
    negative_prompt: str = ""
    steps: int = 3
    guidance_scale: float = 3.0
    scheduler: str | None = None
    pictures: int = 1
    width: int = 64
    height: int = 64
    seed: int = 7

    @property
    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed + index) for index in range(self.pictures)]


def base(slots: int) -> Base:
    """A tiny base whose tensors need no gradients."""
    pipeline = builders.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.eval().requires_grad_(False)
    return Base(pipeline, slots)


def adapters(base: Base, ranks: Mapping[str, int]) -> dict[str, Adapter]:
    """An adapter of that rank for each user; they change latents by about as much as latents are large."""
    made = {}
    parts = (("unet", builders.UNET_LAYERS), ("text_encoder", builders.TEXT_LAYERS))
    for seed, (user, rank) in enumerate(ranks.items()):
        deltas = []
        for component, layers in parts:
            pairs = builders.factors(getattr(base.pipeline, component), layers, rank, seed)
            deltas += [LayerDelta(component, name, pair["A"], pair["B"], rank**-0.5) for name, pair in pairs.items()]
        made[user] = Adapter(tuple(deltas))
    return made


@dataclass(frozen=True)
class Crowd:
    """Users with their adapters, and users without."""

    base: Base
    adapters: Mapping[str, Adapter]

    @torch.inference_mode()
    def task(self, wish: Wish, on_call: OnCall = lambda done, latents: None, alone: bool = False) -> Task:
        adapter, pipeline = self.adapters.get(wish.user), self.base.pipeline
        guided = wish.guidance_scale > 1
        texts = [wish.negative_prompt, wish.prompt] if guided else [wish.prompt]
        config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
        schedule = sampler.schedule(wish.scheduler, config, wish.steps)
        generators = wish.generators
        shape = (1, 4, wish.height // 8, wish.width // 8)
        return Task(
            model=self.base.unet,
            adapter=adapter,
            user_id=wish.user,
            schedule=schedule,
            state=sampler.start(torch.cat([torch.randn(shape, generator=one) for one in generators]), schedule),
            text=torch.cat([self.base.texts.encode(text, adapter).expand(wish.pictures, -1, -1) for text in texts]),
            guidance_scale=wish.guidance_scale,
            guidance_rescale=0.0,
            generators=generators,
            alone=alone,
            on_call=on_call,
        )

    @torch.inference_mode()
    def alone(self, wish: Wish) -> Tensor:
        """The latents of diffusers' own call, with the user's weights merged."""
        pipeline = self._merged[wish.user] if wish.user in self.adapters else self.base.pipeline
        kind = SAMPLERS[wish.scheduler] if wish.scheduler else type(pipeline.scheduler)
        own = StableDiffusionPipeline(
            **{**pipeline.components, "scheduler": kind.from_config(pipeline.scheduler.config)},
            requires_safety_checker=False,
        )
        own.set_progress_bar_config(disable=True)
        latents: Tensor = own(
            wish.prompt,
            negative_prompt=wish.negative_prompt,
            width=wish.width,
            height=wish.height,
            num_inference_steps=wish.steps,
            guidance_scale=wish.guidance_scale,
            num_images_per_prompt=wish.pictures,
            generator=wish.generators,
            output_type="latent",
        ).images
        return latents

    @cached_property
    def _merged(self) -> dict[str, StableDiffusionPipeline]:
        return {user: builders.with_merged(self.base.pipeline, adapter) for user, adapter in self.adapters.items()}
