"""DreamBooth: a base learns one sitter from a few pictures (Ruiz et al., https://arxiv.org/abs/2208.12242).

What is trained of the UNet, and of the text encoder where that is asked for, is in `learned`; the base's weights are
shared with whoever draws with it meanwhile, and stay as they are. A batch has pictures of the sitter, under the rare
token, and the base's own pictures of the class, under its plain noun, so that the class does not become the sitter.

A step depends on the seed, its number and the weights alone: training that is killed goes on from its last state to the
same end, on the same machine to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from api.engine.learned import UNET, Factors, Learned, Weights, components_of
from api.engine.text2image import STABLE_DIFFUSION
from api.engine.words import Heard, Words
from api.errors import ModelUnavailable

TRAINABLE = (STABLE_DIFFUSION, "StableDiffusionXLPipeline")
PREDICTIONS = ("epsilon", "v_prediction")
BETAS, DECAY, EPSILON = (0.9, 0.999), 0.01, 1e-8
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each
WARMUP = 20  # steps
FLOOR = 0.02  # of the rate, at the end
MOST_NORM = 1.0  # of a step's gradient
TEXT_SHARE = 0.5  # of the rate, that the text encoder has unless its base says another
FULL_RATE = 5e-6  # of all weights, as in the paper
HALF_SCALE = 1024.0  # of the loss where the base has float16, so that small gradients are not lost


@dataclass(frozen=True)
class Recipe:
    """How a sitter is trained.

    Attributes:
        steps: of the optimiser.
        rank: of the factors; None where all weights learn.
        rate: the highest learning rate.
        own: pictures of the sitter in a batch.
        prior: pictures of the class in a batch; 0 where the class may become the sitter.
        seed: of the factors' start, the noise and the order of the pictures.
        guidance: the loss is taken on u + guidance · (c − u), as the base's own training did; 1 is the plain loss.
        text_rate: the highest learning rate of the text encoder; 0 where it learns nothing.
        resolution: the side in pixels of the squares that are learned; None for the base's own.
        gamma: caps the weight of steps with little noise, as in min-SNR (https://arxiv.org/abs/2303.09556); but of a
            base that predicts velocity those full of noise keep theirs, which min-SNR would make nothing.
    """

    steps: int
    rank: int | None
    rate: float
    own: int
    prior: int
    seed: int
    guidance: float = 1.0
    text_rate: float = 0.0
    resolution: int | None = None
    gamma: float = 5.0


@dataclass(frozen=True)
class Examples:
    """Pictures, as latents (n, channels, height, width), and the words for each."""

    latents: Tensor
    words: Sequence[str]


def require_trainable(pipeline: DiffusionPipeline) -> None:
    """Raises ModelUnavailable unless a sitter can be trained over a base."""
    if type(pipeline).__name__ not in TRAINABLE:
        raise ModelUnavailable("this base cannot be trained over", "Only Stable Diffusion 1, 2 and XL can.")
    predicts = pipeline.scheduler.config.get("prediction_type")
    if predicts not in PREDICTIONS or pipeline.vae.config.get("latents_mean") is not None:
        raise ModelUnavailable("this base cannot be trained over", "Its noise or its latents are of another kind.")


def recipe_of(pipeline: DiffusionPipeline, *, full: bool = False, **said: Any) -> Recipe:
    """Returns the recipe for a base: what is `said`, else its scheduler's `_training_…`, else what does for most.

    In `full` training all weights learn; what a base says of its rates is called `_training_full_…` then.
    """
    ours: dict[str, Any] = {"steps": 800, "rank": 16, "rate": 1e-4, "own": 1, "prior": 1, "seed": 0, "guidance": 1.0}
    keys = {name: f"_training_{name}" for name in (*ours, "text_rate")}
    if full:
        ours["rate"] = FULL_RATE
        keys |= {name: f"_training_full_{name}" for name in ("rate", "text_rate")}
    config = pipeline.scheduler.config
    given = {name: config[key] for name, key in keys.items() if key in config}
    known = {**ours, **given, **{name: value for name, value in said.items() if value is not None}}
    recipe = Recipe(**{"text_rate": TEXT_SHARE * known["rate"], **known})
    return replace(recipe, rank=None) if full else recipe


class Trainer:
    """Trains one sitter over a base, a step at a time.

    Args:
        pipeline: the base; nothing in it is changed.
        own: pictures of the sitter, with the token's words.
        prior: pictures of the class, or none.
        recipe: how.
    """

    def __init__(self, pipeline: DiffusionPipeline, own: Examples, prior: Examples | None, recipe: Recipe) -> None:
        self.recipe = recipe
        self.done = 0
        self._own, self._prior = own, prior
        self._noise = DDPMScheduler.from_config(pipeline.scheduler.config)
        kept = self._noise.alphas_cumprod
        self._snr = (kept / (1 - kept).clamp(min=1e-8)).to(pipeline.device)
        self._scale = HALF_SCALE if pipeline.unet.dtype == torch.float16 else 1.0
        self._cell = int(pipeline.vae_scale_factor)
        components = components_of(pipeline, texts=recipe.text_rate > 0)
        self.learned: Learned = (
            Weights(pipeline, components)
            if recipe.rank is None
            else Factors(pipeline, components, recipe.rank, recipe.seed)
        )
        modules = dict(self.learned.modules)
        self._unet = modules.pop(UNET)
        self._words = Words(pipeline, modules)
        rates = {name: recipe.rate if name == UNET else recipe.text_rate for name in components}
        self._optimiser = torch.optim.AdamW(
            [{"params": _learning(self.learned.modules[name]), "rate": rate} for name, rate in rates.items()],
            betas=BETAS,
            eps=EPSILON,
            weight_decay=DECAY,
            fused=True,  # without gigabytes in between where all weights learn
        )

    def step(self) -> float:
        """Does one step; returns its loss, which is not finite when the training has failed."""
        chance = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.done)
        examples = [self._own] * self.recipe.own + ([self._prior] * self.recipe.prior if self._prior else [])
        chosen = [int(torch.randint(len(one.latents), (1,), generator=chance)) for one in examples]
        latents = torch.stack([one.latents[index] for one, index in zip(examples, chosen, strict=True)])
        words = [one.words[index] for one, index in zip(examples, chosen, strict=True)]
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * self._pace()
        loss = self._losses(latents, words, chance).mean()
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        learned = self.learned.parameters.values()
        for one in learned:
            if one.grad is not None:
                one.grad /= self._scale
        norm = torch.nn.utils.clip_grad_norm_(learned, MOST_NORM)
        if self._scale == 1.0 or torch.isfinite(norm):  # half precision overflows now and then: that step is left out
            self._optimiser.step()
        self._optimiser.zero_grad()  # now: their memory is for the candidates, which are drawn between steps
        self.done += 1
        return float(loss.detach())

    def _pace(self) -> float:
        """Linear warm-up, then a cosine down to FLOOR."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.done / self.recipe.steps))
        return min(1.0, (self.done + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)

    def _losses(self, latents: Tensor, words: Sequence[str], chance: torch.Generator) -> Tensor:
        """Returns the weighted error of each row at one time each, the times spread over all noise levels."""
        rows, device = len(latents), latents.device
        size = latents.shape[2] * self._cell, latents.shape[3] * self._cell
        spread = (torch.randperm(rows, generator=chance) + torch.rand(rows, generator=chance)) / rows
        most = self._noise.config.num_train_timesteps
        times = (spread * most).long().clamp(max=most - 1).to(device)  # the largest of float32 round up to 1
        noise = torch.randn(latents.shape, generator=chance).to(device)
        noisy = self._noise.add_noise(latents, noise, times)
        predicted = self._predict(noisy, times, self._words.read(words, size))
        if self.recipe.guidance > 1:
            with torch.no_grad():
                wordless = self._predict(noisy, times, self._words.silence(rows, size))
            predicted = wordless + self.recipe.guidance * (predicted - wordless)
        velocity = self._noise.config.prediction_type == "v_prediction"
        target = self._noise.get_velocity(latents, noise, times) if velocity else noise
        errors = mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        # Steps full of noise, where it is decided what is to be seen, keep their full weight.
        weights: Tensor = (self.recipe.gamma / (self._snr[times] + velocity)).clamp(max=1)
        return weights * errors

    def _predict(self, noisy: Tensor, times: Tensor, heard: Heard) -> Tensor:
        dtype = next(self._unet.parameters()).dtype
        added = heard.added and {name: one.to(dtype) for name, one in heard.added.items()}
        with self.learned.passes():
            predicted: Tensor = self._unet(
                noisy.to(dtype), times, heard.texts.to(dtype), added_cond_kwargs=added, return_dict=False
            )[0]
        return predicted.float()

    def state(self) -> dict[str, Tensor]:
        """Returns all that a step changes, on the host; it is not to be written to, and holds until the next step."""
        tensors = {"done": torch.tensor(self.done)}
        for name, one in self.learned.parameters.items():
            moments: Mapping[str, Tensor] = self._optimiser.state[one]
            tensors[f"learned.{name}"] = one.detach().cpu().contiguous()
            tensors |= {f"{moment}.{name}": value.cpu().contiguous() for moment, value in moments.items()}
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to a `state`; the next step is the one that came after it."""
        self.done = int(state["done"])
        with torch.no_grad():
            for name, one in self.learned.parameters.items():
                one.copy_(state[f"learned.{name}"])
                known = {moment: state[key] for moment in MOMENTS if (key := f"{moment}.{name}") in state}
                self._optimiser.state[one] = {moment: _moment(one, value) for moment, value in known.items()}


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [one for one in module.parameters() if one.requires_grad]


def _moment(of: Tensor, value: Tensor) -> Tensor:
    """Returns a copy of a moment, laid out in memory as what it is of: fused steps take both by their bytes."""
    return (torch.empty_like(of) if value.dim() else torch.empty_like(value, device=of.device)).copy_(value)
