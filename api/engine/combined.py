"""Several LoRAs at once: their products add up, which is one LoRA whose factors are theirs side by side.

Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] [A₁; A₂; …], of the sum of their ranks. So a combination rides in a slot as any other does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from api.engine.adapters import Adapter, Delta, LayerDelta, NormDelta


@dataclass(frozen=True)
class _Combination:
    """Names a combined adapter: the same parts with the same weights are the same one."""

    parts: tuple[tuple[object, float], ...]


def combined(parts: Sequence[tuple[Adapter, float]], fast: bool = False) -> Adapter:
    """Returns the adapter that changes a base as all of `parts` do, each counted by its weight.

    Args:
        parts: one or more, all checked against the same base.
        fast: whether one of them is what the base draws few steps with.
    """
    layers: dict[tuple[str, str], list[tuple[Delta, float]]] = {}
    for adapter, weight in parts:
        for delta in adapter.deltas:
            layers.setdefault((delta.component, delta.layer), []).append((delta, weight))
    deltas = tuple(_sum(weighted) for weighted in layers.values())
    return Adapter(deltas, any(adapter.of_checkpoint for adapter, _ in parts), fast, name_of(parts))


def name_of(parts: Sequence[tuple[Adapter, float]]) -> object:
    """Returns the key of what `combined` makes of these."""
    return _Combination(tuple((adapter.key, weight) for adapter, weight in parts))


def is_made_of(key: object, part: object) -> bool:
    """Whether `key` names the adapter that `part` names, or a combination with it."""
    return key is part or (isinstance(key, _Combination) and any(held is part for held, _ in key.parts))


def _sum(weighted: Sequence[tuple[Delta, float]]) -> Delta:
    layers = [(delta, weight) for delta, weight in weighted if isinstance(delta, LayerDelta)]
    if not layers:
        return _sum_of_norms([(delta, weight) for delta, weight in weighted if isinstance(delta, NormDelta)])
    first, _ = layers[0]
    down = torch.cat([delta.down.reshape(delta.rank, *first.down.shape[1:]).float() for delta, _ in layers])
    up = torch.cat([delta.up.flatten(1).float() * (delta.scale * weight) for delta, weight in layers], dim=1)
    biases = [weight * delta.bias for delta, weight in layers if delta.bias is not None]
    return LayerDelta(first.component, first.layer, down, up, 1.0, sum(biases[1:], biases[0]) if biases else None)


def _sum_of_norms(weighted: Sequence[tuple[NormDelta, float]]) -> NormDelta:
    first, _ = weighted[0]
    weight, bias = (
        torch.stack([weight * getattr(delta, name) for delta, weight in weighted]).sum(0) for name in ("weight", "bias")
    )
    return NormDelta(first.component, first.layer, weight, bias)
