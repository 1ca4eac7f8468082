"""Layers with a table: each row of a batch is changed by what its slot of the table holds.

y = W x + b + B[slot] (A[slot] x) + Δb[slot], the gathered form of Punica (https://arxiv.org/abs/2310.18547, section 4)
and S-LoRA (https://arxiv.org/abs/2311.03285), here for convolutions, biases and norms as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from api.engine.adapters import Delta, Layer, LayerDelta, Norm, NormDelta

RANKS = (4, 8, 16, 32, 64, 128)  # of tables: few shapes to compile for, and one high rank makes every row slower


@dataclass
class Rows:
    """The rows of the forward that runs: `index` (rows,) has the slot of each; None when no row has an adapter."""

    index: Tensor | None = None


class Table:
    """The factors of one layer in every slot: `down` (slots, rank, in…) and `up` (slots, out, rank), 0 where unused.

    `bias` (slots, out) is what is added besides, if some slot `has_bias`.

    Args:
        bare: the layer, whose precision and device they have.
        slots: how many.
        rows: says which of them a forward uses.
        shrinks: whether it takes less room once no adapter needs so much; what is compiled would be so anew.
    """

    def __init__(self, bare: Layer, slots: int, rows: Rows, shrinks: bool = True) -> None:
        self.bare = bare
        self.rows = rows
        self._shrinks = shrinks
        self.down = _zeros(bare.weight, slots, 0, *bare.weight.shape[1:])
        self.up = _zeros(bare.weight, slots, bare.weight.shape[0], 0)
        self.bias: Tensor | None = None  # until somebody has any
        self._biased: set[int] = set()
        self.has_bias = False  # a plain bool: a compiled forward guards on it
        self.ranks: dict[int, int] = {}  # by slot, of the adapters that are here

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what it holds."""
        return (self.down, self.up) if self.bias is None else (self.down, self.up, self.bias)

    def make_room(self, slot: int, rank: int) -> None:
        """Takes on the rank that the adapters need once `slot` has one of `rank`: the highest decides for all."""
        needed = max([rank, *(other for held, other in self.ranks.items() if held != slot)])
        if not self._shrinks:
            needed = max(needed, self.down.shape[1])
        ranks = next((size for size in RANKS if size >= needed), needed)
        kept = min(ranks, self.down.shape[1])
        if ranks == self.down.shape[1]:
            return
        down = _zeros(self.down, self.down.shape[0], ranks, *self.down.shape[2:])
        up = _zeros(self.up, *self.up.shape[:2], ranks)
        down[:, :kept] = self.down[:, :kept]
        up[:, :, :kept] = self.up[:, :, :kept]
        self.down, self.up = down, up

    def write(self, slot: int, delta: Delta | None) -> None:
        """Overwrites the whole slot: with the delta, its scale folded into `up`, or with zeros."""
        assert delta is None or isinstance(delta, LayerDelta)  # the adapter was checked against its base
        rank = delta.rank if delta else 0
        self.ranks[slot] = rank
        self.down[slot, rank:] = 0
        self.up[slot, :, rank:] = 0
        if delta:
            # First to the device as they are: from pinned memory that does not hold up the CPU.
            down, up = (factor.to(self.down.device, non_blocking=True) for factor in (delta.down, delta.up))
            self.down[slot, :rank].copy_(down.reshape(rank, *self.down.shape[2:]))
            self.up[slot, :, :rank].copy_(up.flatten(1).float() * delta.scale)
        self._write_bias(slot, delta.bias if delta else None)

    def _write_bias(self, slot: int, change: Tensor | None) -> None:
        if self.bias is None and change is not None:
            self.bias = _zeros(self.bare.weight, *self.up.shape[:2])
        if self.bias is not None:
            self.bias[slot] = 0 if change is None else change
            self._biased.discard(slot) if change is None else self._biased.add(slot)
        self.has_bias = bool(self._biased)

    def bias_of_rows(self, index: Tensor) -> Tensor:
        """Returns what is added to each row: (rows, out)."""
        assert self.bias is not None
        return self.bias.index_select(0, index)

    def of_rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of each row: (rows, rank, in…) and (rows, out, rank)."""
        return self.down.index_select(0, index), self.up.index_select(0, index)


class NormTable:
    """The weight and the bias (slots, channels) of one norm in every slot; its own, unless some slot `is_changed`.

    Args:
        bare: the norm.
        slots: how many.
        rows: says which of them a forward uses.
    """

    def __init__(self, bare: Norm, slots: int, rows: Rows) -> None:
        self.bare = bare
        self.rows = rows
        self.weight, self.bias = (_repeated(parameter, slots) for parameter in (bare.weight, bare.bias))
        self._changed: set[int] = set()
        self.is_changed = False

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what it holds."""
        return self.weight, self.bias

    def make_room(self, slot: int, rank: int) -> None:
        """There is room for every change."""

    def write(self, slot: int, delta: Delta | None) -> None:
        """Overwrites the slot: with the norm's own changed by the delta, or with its own."""
        if delta is None and slot not in self._changed:
            return
        assert delta is None or isinstance(delta, NormDelta)  # the adapter was checked against its base
        self._changed.add(slot) if delta else self._changed.discard(slot)
        self.is_changed = bool(self._changed)
        own = {"weight": self.bare.weight, "bias": self.bare.bias}
        new = delta.parameters(self.bare) if delta else own
        self.weight[slot].copy_(new["weight"].detach())
        self.bias[slot].copy_(new["bias"].detach())

    def affine(self, x: Tensor, index: Tensor, channels: int) -> Tensor:
        """Returns x · weight + bias, each row by its slot's, for a normalized `x` (rows, …); `channels` is an axis."""
        shape = [len(index), *(-1 if axis == channels else 1 for axis in range(1, x.dim()))]
        weight, bias = (table.index_select(0, index).reshape(shape) for table in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight)


# The two functions below are where another form of the same sum would be chosen. The dense one, which multiplies every
# row by the factors of every slot and masks, took 12.0 ms a row in place of 12.2 in float32 and 7.9 in place of 7.2 in
# bfloat16 (the bundled model on two CPU cores, 16 rows of rank 16); with fewer rows it lost in both.


def _change_linear(y: Tensor, x: Tensor, table: Table, index: Tensor) -> Tensor:
    """Returns `y` (rows, …, out) plus each row's own B A x, for `x` (rows, …, in)."""
    down, up = table.of_rows(index)
    flat = y.reshape(y.shape[0], -1, y.shape[-1])
    if table.has_bias:
        flat = flat + table.bias_of_rows(index)[:, None]
    hidden = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), down.mT)
    return torch.baddbmm(flat, hidden, up.mT).reshape(y.shape)


def _change_conv(y: Tensor, x: Tensor, table: Table, index: Tensor, conv: nn.Conv2d) -> Tensor:
    """Returns `y` (rows, out, h', w') plus each row's own B conv(A, x), for `x` (rows, in, h, w).

    A has the kernel of `conv` and moves as it does, the rows being the groups of one convolution; B is 1×1.
    """
    down, up = table.of_rows(index)
    rows, flat = len(index), y.flatten(2)
    if table.has_bias:
        flat = flat + table.bias_of_rows(index)[:, :, None]
    if conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0):
        hidden = torch.bmm(down.flatten(2), x.flatten(2))  # half the time of a convolution
    else:
        as_channels = x.reshape(1, -1, *x.shape[2:])
        hidden = functional.conv2d(
            as_channels, down.flatten(0, 1), None, conv.stride, conv.padding, conv.dilation, groups=rows
        ).reshape(rows, down.shape[1], -1)
    return torch.baddbmm(flat, up, hidden).reshape(y.shape)


class _SlottedLinear(nn.Linear):
    table: Table

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        index = self.table.rows.index
        return y if index is None else _change_linear(y, input, self.table, index)


class _SlottedConv2d(nn.Conv2d):
    table: Table

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        index = self.table.rows.index
        return y if index is None else _change_conv(y, input, self.table, index, self)


class _SlottedGroupNorm(nn.GroupNorm):
    table: NormTable

    def forward(self, input: Tensor) -> Tensor:
        index = self.table.rows.index
        if index is None or not self.table.is_changed:
            return super().forward(input)
        return self.table.affine(functional.group_norm(input, self.num_groups, eps=self.eps), index, channels=1)


class _SlottedLayerNorm(nn.LayerNorm):
    table: NormTable

    def forward(self, input: Tensor) -> Tensor:
        index = self.table.rows.index
        if index is None or not self.table.is_changed:
            return super().forward(input)
        normalized = functional.layer_norm(input, self.normalized_shape, eps=self.eps)
        return self.table.affine(normalized, index, channels=input.dim() - 1)


def is_plain(layer: nn.Module) -> bool:
    """Whether a table can stand for what changes in the layer."""
    # Exactly: a subclass may compute something else.
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    if type(layer) is nn.LayerNorm:
        return len(layer.normalized_shape) == 1
    return type(layer) in SLOTTED


SLOTTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _SlottedLinear,
    nn.Conv2d: _SlottedConv2d,
    nn.GroupNorm: _SlottedGroupNorm,
    nn.LayerNorm: _SlottedLayerNorm,
}


def slotted(table: Table | NormTable) -> nn.Module:
    """Returns a layer that does what `table.bare` does, with the same parameters and hooks, and adds the table's."""
    kind = SLOTTED[type(table.bare)]
    layer = kind.__new__(kind)
    # Not by __init__: it would make parameters, which accelerate puts on "meta" while another thread loads a model.
    layer.__dict__.update(table.bare.__dict__, table=table)
    return layer


def _repeated(parameter: Tensor, slots: int) -> Tensor:
    with torch.inference_mode(False):
        return parameter.detach().repeat(slots, 1)


def _zeros(like: Tensor, *shape: int) -> Tensor:
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
