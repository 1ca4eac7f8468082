"""The UNet's training set: latents of renders in many shapes, made in shards so that training can
begin on the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.common import autocast, save, to_tensor
from training.portrait import render
from training.world import Spec, random_spec

NATIVE = (16, 16)  # latent cells of a 512 picture
_OTHER = (
    (8, 8),
    (8, 8),
    (12, 12),
    (12, 12),
    (24, 24),
    (24, 24),
    (32, 32),
    (32, 32),
    (16, 24),
    (24, 16),
    (12, 16),
    (16, 12),
    (8, 16),
    (16, 8),
    (20, 16),
    (16, 20),
    (16, 32),
    (32, 16),
    (32, 24),
    (24, 32),
    (20, 20),
    (8, 12),
    (12, 8),
    (14, 14),
)
_CORE_CELL = 16  # pixels of a core picture in one cell


@dataclass(frozen=True)
class Shard:
    """Latents (n, channels, rows, columns) of the specs drawn from the seeds (n,)."""

    latents: Tensor
    seeds: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.latents.shape[2], self.latents.shape[3])

    def specs(self) -> list[Spec]:
        return [random_spec(Random(seed)) for seed in self.seeds.tolist()]


def plan(native: int) -> Iterator[tuple[tuple[int, int], int]]:
    """(shape, pictures) of each shard: two native ones, then one of another shape, up to `native` native pictures."""
    shards, other = max(1, native // 250), 0
    for i in range(shards):
        yield NATIVE, min(native, 250)
        if i % 2 == 1 or shards == 1:
            yield _OTHER[other % len(_OTHER)], min(native, 200)
            other += 1


@torch.no_grad()
def encode(core: AutoencoderKL, native: int, folder: Path) -> None:
    """Render and encode every planned shard that is not there yet, into `folder`/latents-*.pt."""
    core.eval()
    for number, (shape, count) in enumerate(plan(native)):
        path = folder / f"latents-{number:04d}.pt"
        if path.exists():
            continue
        seeds = torch.arange(count) + 1_000_000 + number * 10_000
        batches = []
        for start in range(0, count, 8):
            specs = [random_spec(Random(seed)) for seed in seeds[start : start + 8].tolist()]
            pictures = [render(spec, shape[1] * _CORE_CELL, shape[0] * _CORE_CELL) for spec in specs]
            with autocast():
                batches.append(core.encode(to_tensor(pictures)).latent_dist.mean.half())
        save(path, latents=torch.cat(batches), seeds=seeds)


def load_shards(folder: Path, known: dict[str, Shard]) -> bool:
    """Add shards that have appeared since to `known`, by file name; True if there were any."""
    fresh = [path for path in sorted(folder.glob("latents-*.pt")) if path.name not in known]
    for path in fresh:
        known[path.name] = Shard(**torch.load(path, weights_only=True))
    return bool(fresh)
