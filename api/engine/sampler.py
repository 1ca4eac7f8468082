"""Samplers as tables of numbers: a batch in which every row has its own sampler and step moves on in one expression.

Each sampler of diffusers is linear in what it is given: the latents x, the UNet's prediction, its memory (at most
three past predictions H0, H1, H2, the latest first, and one past sample L) and fresh noise. So each of its calls is a
5 × 7 matrix, from (x, H0, H1, H2, L, prediction, noise) to the next (x, H0, H1, H2, L). The matrices are read off
diffusers' own scheduler by giving it unit vectors, and rehearsed against it on random numbers before they are used:
its formulas are not written a second time, its options are honoured as it does itself, and what is not linear or
remembers more is refused. A table is made once; drawing keeps no scheduler.

The formulas, all in diffusers/schedulers/:
    ddim      https://arxiv.org/abs/2010.02502, (12)          scheduling_ddim.py
    euler     https://arxiv.org/abs/2206.00364, algorithm 2   scheduling_euler_discrete.py (without churn)
    euler_a   k-diffusion's sample_euler_ancestral            scheduling_euler_ancestral_discrete.py
    dpmpp_2m  https://arxiv.org/abs/2211.01095, algorithm 2   scheduling_dpmsolver_multistep.py
    unipc     https://arxiv.org/abs/2302.04867, (3) and (9)   scheduling_unipc_multistep.py
    lcm       https://arxiv.org/abs/2310.04378, algorithm 3   scheduling_lcm.py
"""

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from api.errors import InvalidRequest, ModelUnavailable, SitterError

SAMPLERS: dict[str, type[Any]] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}

PAST = 3  # predictions remembered: as many as UniPC and DPM-Solver++ of third order, and PLMS, look back
STATE = 1 + PAST + 1  # the latents, past predictions, a past sample
INPUTS = STATE + 2  # and the prediction, and noise
PREDICTION, NOISE = STATE, STATE + 1  # their places among the inputs

# Of the latents' scale, in the rehearsal. A missed term or a clip is far above; rounding is about 1e-6, but 1e-3 where
# Euler starts from latents of 4096 (zero terminal SNR) and subtracts nearly all of that, in diffusers as here.
TOLERANCE = 1e-2
LEAST_SIGNAL = 1e-5  # of ᾱ, below which nothing of a picture is foreseen: where it is 0 nothing can be


@dataclass(frozen=True, eq=False)
class Schedule:
    """One sampler at one number of steps; shared between requests, so never written to.

    `calls` of the UNet may be more than the steps asked for.
    """

    timesteps: Tensor  # (calls,) float32, as the UNet is given them
    scales: Tensor  # (calls,) float32: the UNet is given scale × latents
    coefficients: Tensor  # (calls, STATE, INPUTS) float32, see `step`
    clean: Tensor  # (calls, 2) float32, see `foreseen`
    initial_scale: float  # the first latents are this × noise of variance 1
    needs_noise: bool  # a call adds fresh noise

    @property
    def calls(self) -> int:
        """How often the UNet is called."""
        return len(self.timesteps)


def schedule(name: str | None, config: Mapping[str, Any], steps: int) -> Schedule:
    """Returns the table of a sampler for a model, from a cache where it has been asked for before.

    A table takes tens of milliseconds to make: ask outside the step loop.

    Args:
        name: one of SAMPLERS, or None for the model's own, which is any linear scheduler of diffusers.
        config: the configuration of the model's scheduler; `_class_name` says which is its own.
        steps: as asked for, from 1.

    Raises:
        InvalidRequest: the sampler has fewer steps than that.
        ModelUnavailable: the sampler, so configured, is no such table: it clips or thresholds, remembers more, draws
            noise twice a step, takes steps that are not finite, or diffusers itself refuses it.
    """
    kind = name or config.get("_class_name", "")
    return _schedule(kind, json.dumps(dict(config), sort_keys=True), steps)


def start(noise: Tensor, schedule: Schedule) -> Tensor:
    """Returns the state (rows, STATE, channels, height, width) of rows before their first call.

    Args:
        noise: (rows, channels, height, width) of variance 1. To be that of the stock pipeline, each row is the first
            that its picture's CPU generator draws, in float32; `step` is then given the generator's next, call by call.
        schedule: of all these rows.
    """
    state = noise.new_zeros(noise.shape[0], STATE, *noise.shape[1:], dtype=torch.float32)
    state[:, 0] = noise * schedule.initial_scale
    return state


def step(state: Tensor, prediction: Tensor, coefficients: Tensor, noise: Tensor | None = None) -> Tensor:
    """Returns the state of every row after a call of the UNet; `state[:, 0]` are its latents.

    Rows do not touch each other: they may be at any call of any sampler, and join and leave between calls as slices
    of the state do. Products and sums only, not a matrix product, which may round to TF32 or by the batch's size.

    Args:
        state: (rows, STATE, channels, height, width) float32.
        prediction: (rows, channels, height, width), the UNet's, guided; any float type.
        coefficients: (rows, STATE, INPUTS): for each row that of its schedule at its call.
        noise: (rows, channels, height, width) of variance 1, anything finite in rows that need none;
            None if no row needs any.
    """
    fresh = [prediction] if noise is None else [prediction, noise]
    inputs = torch.cat([state, *(tensor[:, None].to(state.dtype) for tensor in fresh)], dim=1)
    weights = coefficients[:, :, : inputs.shape[1], None, None, None]
    return (weights * inputs[:, None]).sum(dim=2)


def foreseen(given: Tensor, prediction: Tensor, clean: Tensor) -> Tensor:
    """Returns what rows would end as if a call's prediction were right: (rows, channels, height, width) float32.

    Args:
        given: (rows, channels, height, width), what the UNet was given.
        prediction: likewise, what it said, guided; any float type.
        clean: (rows, 2): for each row that of its schedule at its call.
    """
    ours, theirs = clean[:, :, None, None, None].unbind(1)
    return ours * given + theirs * prediction.to(given.dtype)


@lru_cache(maxsize=256)
def _schedule(kind: str, config: str, steps: int) -> Schedule:
    try:
        scheduler = _scheduler(kind, json.loads(config), steps)
        untouched = copy.deepcopy(scheduler)
        table = _read(scheduler)
        _rehearse(table, untouched)
    except SitterError:
        raise
    except Exception as error:  # diffusers says no in as many types as there are options
        raise _refusal(kind, str(error)) from error
    return table


def _scheduler(kind: str, config: dict[str, Any], steps: int) -> Any:
    """Returns diffusers' scheduler for `config`, mended as StableDiffusionPipeline does, ready for the first call."""
    found: Any = SAMPLERS.get(kind) or getattr(diffusers, kind, None)
    if SchedulerMixin not in getattr(found, "__mro__", ()):
        raise _refusal(kind, "diffusers has no such scheduler")
    scheduler = found.from_config({**config, "clip_sample": False, "steps_offset": 1})
    settings = scheduler.config
    most = settings.original_inference_steps if found is LCMScheduler else settings.num_train_timesteps
    if steps > most:
        raise InvalidRequest(f"{kind} has at most {most} steps, not {steps}", "Ask for fewer num_inference_steps.")
    scheduler.set_timesteps(steps)
    return scheduler


def _read(scheduler: Any) -> Schedule:
    """Returns what `scheduler` does with each of its inputs, by giving it unit vectors of all of them at each call."""
    units = torch.eye(INPUTS).reshape(INPUTS, INPUTS, 1, 1, 1)  # (input, place, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    noises = _Noise()
    scales, coefficients = [], []
    for timestep in scheduler.timesteps:
        scales.append(scheduler.scale_model_input(one, timestep).reshape(()))
        _remind(scheduler, units[1:STATE])
        after = noises.step(scheduler, units[PREDICTION], timestep, units[0])
        matrix = torch.stack([after, *_remembered(scheduler, after)]).reshape(STATE, INPUTS)
        if noises.drawn is not None:
            drawn = noises.drawn.reshape(INPUTS)
            share = matrix[:, NOISE] / drawn[NOISE]
            matrix = matrix - share[:, None] * drawn
            matrix[:, NOISE] = share
        coefficients.append(matrix)
    table = torch.stack(coefficients)
    return Schedule(
        timesteps=scheduler.timesteps.float(),
        scales=torch.stack(scales).float(),
        coefficients=table,
        clean=_clean(scheduler),
        initial_scale=float(scheduler.init_noise_sigma),
        needs_noise=bool(table[:, :, NOISE].any()),
    )


def _clean(scheduler: Any) -> Tensor:
    """Returns by how much the UNet's input and its prediction count in the clean latents of each call: (calls, 2).

    x0 = (x - √(1 - ᾱ) ε) / √ᾱ, or √ᾱ x - √(1 - ᾱ) v (https://arxiv.org/abs/2202.00512, appendix D). Where a scheduler
    says nothing of ᾱ, the latents stand for what they become.
    """
    calls = len(scheduler.timesteps)
    if (kept := getattr(scheduler, "alphas_cumprod", None)) is None:
        return torch.tensor([1.0, 0.0]).expand(calls, 2)
    times = scheduler.timesteps.float().cpu().clamp(0, len(kept) - 1)
    before = times.floor().long()
    share = torch.lerp(kept[before].float(), kept[times.ceil().long()].float(), times - before)
    signal, noise = share.clamp(min=LEAST_SIGNAL).sqrt(), (1 - share).sqrt()
    match scheduler.config.get("prediction_type", "epsilon"):
        case "epsilon":
            return torch.stack([1 / signal, -noise / signal], dim=1)
        case "v_prediction":
            return torch.stack([signal, -noise], dim=1)
    return torch.tensor([0.0, 1.0]).expand(calls, 2)


def _rehearse(table: Schedule, scheduler: Any) -> None:
    """Raises ModelUnavailable unless `table` does what `scheduler`, before its first call, does with random numbers."""
    generator = torch.Generator().manual_seed(1)
    noises = _Noise()
    first = torch.randn(1, 4, 4, 4, generator=generator)
    state = start(first, table)
    latents = state[:, 0]
    for timestep, coefficients in zip(scheduler.timesteps, table.coefficients, strict=True):
        prediction = torch.randn(first.shape, generator=generator)
        scheduler.scale_model_input(latents, timestep)
        latents = noises.step(scheduler, prediction, timestep, latents)
        state = step(state, prediction, coefficients[None], noises.drawn)
        error, scale = (latents - state[:, 0]).abs().max(), latents.abs().max()
        if not torch.isfinite(error):
            raise _refusal(type(scheduler).__name__, "its steps are not finite")
        if error > TOLERANCE * scale:
            raise _refusal(type(scheduler).__name__, "its steps are not linear in at most three predictions")


class _Noise:
    """Random numbers for a scheduler, and what it drew of them in its last step: the state of two equal generators."""

    def __init__(self) -> None:
        self._theirs, self._ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        self.drawn: Tensor | None = None

    def step(self, scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        takes = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": self._theirs} if takes else {}
        after: Tensor = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        self.drawn = None
        if not self._level():
            self.drawn = torch.randn(latents.shape, generator=self._ours)
        if not self._level():
            raise _refusal(type(scheduler).__name__, "it draws noise more than once a step")
        return after

    def _level(self) -> bool:
        return torch.equal(self._theirs.get_state(), self._ours.get_state())


def _past(scheduler: Any) -> list[Tensor | None]:
    """The predictions that `scheduler` keeps, the latest last: of DPM-Solver++ and UniPC, or of PNDM (PLMS)."""
    past: list[Tensor | None] = getattr(scheduler, "model_outputs", None) or getattr(scheduler, "ets", [])
    return past


def _remind(scheduler: Any, memory: Tensor) -> None:
    """Puts `memory` (H0, H1, H2, L) in the place of what `scheduler` remembers."""
    past = _past(scheduler)
    for age in range(1, min(PAST, len(past)) + 1):
        if past[-age] is not None:
            past[-age] = memory[age - 1]
    for name in ("last_sample", "cur_sample"):
        if getattr(scheduler, name, None) is not None:
            setattr(scheduler, name, memory[PAST])


def _remembered(scheduler: Any, like: Tensor) -> list[Tensor]:
    """Returns H0, H1, H2 and L as `scheduler` remembers them, zeros for what it does not."""
    past = [tensor for tensor in reversed(_past(scheduler)) if tensor is not None]
    samples = [getattr(scheduler, name, None) for name in ("last_sample", "cur_sample")]
    sample = next((tensor for tensor in samples if tensor is not None), torch.zeros_like(like))
    return [*(past + [torch.zeros_like(like)] * PAST)[:PAST], sample]


def _refusal(kind: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(f"the scheduler {kind or '(unnamed)'}, as this model configures it, is refused: {why}")
