"""What every training stage shares: pictures as tensors, the pace of a stage, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(height, width, 3) bytes to one (n, 3, height, width) tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(batch: Tensor) -> NDArray[np.uint8]:
    """(n, 3, height, width) in [-1, 1] to (n, height, width, 3) bytes."""
    scaled = (batch.float().clamp(-1, 1) + 1) * 127.5
    return np.asarray(scaled.round().byte().permute(0, 2, 3, 1).numpy())


class Pace:
    """How far a stage is: by its steps, or by the clock where its time runs out first.

    Iterate over it for the step numbers; `rate` turns progress into a learning rate factor."""

    def __init__(self, name: str, steps: int, minutes: float, start: int = 0) -> None:
        self.name, self.steps, self.step = name, steps, start
        self._seconds, self._began, self._start = minutes * 60, time.monotonic(), start
        self._offset = start / steps if steps else 0.0
        self._sums: dict[str, list[float]] = {}

    @property
    def progress(self) -> float:
        clock = self._offset + (1 - self._offset) * (time.monotonic() - self._began) / self._seconds
        return min(1.0, max(self.step / self.steps, clock))

    def __iter__(self) -> Pace:
        return self

    def __next__(self) -> int:
        if self.step > self._start and self.progress >= 1:
            raise StopIteration
        self.step += 1
        return self.step

    def rate(self, warmup: int = 50, flat: float = 0.0, floor: float = 0.02) -> float:
        """Linear warm-up, then flat for a share of the stage, then a cosine down to `floor`."""
        falling = max(0.0, self.progress - flat) / (1 - flat)
        cosine = 0.5 * (1 + math.cos(math.pi * falling))
        return min(1.0, (self.step - self._start) / warmup) * (floor + (1 - floor) * cosine)

    def note(self, every: int, **values: float) -> None:
        """Collect figures, and print their means once in `every` steps."""
        for key, value in values.items():
            self._sums.setdefault(key, []).append(value)
        if self.step % every == 0:
            seconds = time.monotonic() - self._began
            means = " ".join(f"{key} {np.nanmean(column):.4f}" for key, column in self._sums.items())
            pace = seconds / max(1, self.step - self._start)
            print(f"{self.name} {self.step}/{self.steps} {self.progress:.0%} {pace:.2f} s/step {means}", flush=True)
            self._sums.clear()


def descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """One step down, with the gradient's norm held to 1."""
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Scale each group's own `base` learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["base"] * factor


def save(path: Path, **parts: Any) -> None:
    """Write a checkpoint whole or not at all. Modules and optimisers are stored by their state."""
    states = {key: part.state_dict() if hasattr(part, "state_dict") else part for key, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(states, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def average(target: nn.Module, source: nn.Module, decay: float) -> None:
    """Exponential moving average of parameters, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)
