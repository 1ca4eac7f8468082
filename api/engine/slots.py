"""Slots: rows of different users' LoRAs in one forward of one module.

Each layer that some LoRA changes keeps a table of factors for a fixed number of slots, and each row of the batch names
its slot: y = W x + b + B[slot] (A[slot] x), the gathered form of Punica (https://arxiv.org/abs/2310.18547, section 4)
and S-LoRA (https://arxiv.org/abs/2311.03285), here for convolutions as well. Slot 0 has no adapter. A new user is a
copy into a slot: no module is built, and no buffer moves unless a layer meets a higher rank than ever before.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from api.engine.adapters import Adapter, Layer, LayerDelta
from api.engine.weights import shell

NO_ADAPTER = 0
RANKS = (4, 8, 16, 32, 64, 128)  # of tables: few shapes to compile for, and one high rank makes every row slower
HIGHEST_RANK = RANKS[-1]  # that shares a forward with others


class SlotsFull(Exception):
    """Every slot is in use: wait for a release. The batch's own matter, so no SitterError."""


class NotForSlots(Exception):
    """The adapter cannot ride in these slots; see `Slots.fits`."""


@dataclass
class _Rows:
    """The rows of the forward that runs: `index` (rows,) has the slot of each; None when no row has an adapter."""

    index: Tensor | None = None


class _Table:
    """The factors of one layer in every slot: `down` (slots, rank, in…) and `up` (slots, out, rank), 0 where unused.

    Args:
        bare: the layer, whose precision and device they have.
        slots: how many.
        rows: says which of them a forward uses.
    """

    def __init__(self, bare: Layer, slots: int, rows: _Rows) -> None:
        self.bare = bare
        self.rows = rows
        self.down = _zeros(bare.weight, slots, 0, *bare.weight.shape[1:])
        self.up = _zeros(bare.weight, slots, bare.weight.shape[0], 0)
        self.ranks: dict[int, int] = {}  # by slot, of the adapters that are here

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def make_room(self, slot: int, rank: int) -> None:
        """Takes on the rank that the adapters need once `slot` has one of `rank`: the highest decides for all."""
        needed = max([rank, *(other for held, other in self.ranks.items() if held != slot)])
        ranks = next((size for size in RANKS if size >= needed), needed)
        kept = min(ranks, self.down.shape[1])
        if ranks == self.down.shape[1]:
            return
        down = _zeros(self.down, self.down.shape[0], ranks, *self.down.shape[2:])
        up = _zeros(self.up, *self.up.shape[:2], ranks)
        down[:, :kept] = self.down[:, :kept]
        up[:, :, :kept] = self.up[:, :, :kept]
        self.down, self.up = down, up

    def write(self, slot: int, delta: LayerDelta | None) -> None:
        """Overwrites the whole slot: with the delta, its scale folded into `up`, or with zeros."""
        rank = delta.down.shape[0] if delta else 0
        self.ranks[slot] = rank
        self.down[slot, rank:] = 0
        self.up[slot, :, rank:] = 0
        if delta:
            self.down[slot, :rank].copy_(delta.down.reshape(rank, *self.down.shape[2:]))
            self.up[slot, :, :rank].copy_(delta.up.flatten(1).float() * delta.scale)

    def of_rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of each row: (rows, rank, in…) and (rows, out, rank)."""
        return self.down.index_select(0, index), self.up.index_select(0, index)


# The two functions below are where another form of the same sum would be chosen. The dense one, which multiplies every
# row by the factors of every slot and masks, took 12.0 ms a row in place of 12.2 in float32 and 7.9 in place of 7.2 in
# bfloat16 (the bundled model on two CPU cores, 16 rows of rank 16); with fewer rows it lost in both.


def _change_linear(y: Tensor, x: Tensor, table: _Table, index: Tensor) -> Tensor:
    """Returns `y` (rows, …, out) plus each row's own B A x, for `x` (rows, …, in)."""
    down, up = table.of_rows(index)
    hidden = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), down.mT)
    return torch.baddbmm(y.reshape(y.shape[0], -1, y.shape[-1]), hidden, up.mT).reshape(y.shape)


def _change_conv(y: Tensor, x: Tensor, table: _Table, index: Tensor, conv: nn.Conv2d) -> Tensor:
    """Returns `y` (rows, out, h', w') plus each row's own B conv(A, x), for `x` (rows, in, h, w).

    A has the kernel of `conv` and moves as it does, the rows being the groups of one convolution; B is 1×1.
    """
    down, up = table.of_rows(index)
    rows = len(index)
    if conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0):
        hidden = torch.bmm(down.flatten(2), x.flatten(2))  # half the time of a convolution
    else:
        as_channels = x.reshape(1, -1, *x.shape[2:])
        hidden = functional.conv2d(
            as_channels, down.flatten(0, 1), None, conv.stride, conv.padding, conv.dilation, groups=rows
        ).reshape(rows, down.shape[1], -1)
    return torch.baddbmm(y.flatten(2), up, hidden).reshape(y.shape)


class _SlottedLinear(nn.Linear):
    table: _Table

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        index = self.table.rows.index
        return y if index is None else _change_linear(y, input, self.table, index)


class _SlottedConv2d(nn.Conv2d):
    table: _Table

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        index = self.table.rows.index
        return y if index is None else _change_conv(y, input, self.table, index, self)


class Slots:
    """A fixed number of slots for adapters, in a module that is a copy of the base's and shares its weights.

    Adapters may be dropped by any thread; all else is for one thread at a time.

    Args:
        module: of the base; it stays as it is. The copy's layers are wrapped when the first adapter that changes them
            comes. A wrapper is a layer of the same kind that shares the bare one's dictionaries.
        component: its name in the base, as `LayerDelta` says it.
        count: how many adapters it holds at once; their slots are 1 … count.
        highest_rank: of adapters that it takes.
    """

    def __init__(self, module: nn.Module, component: str, count: int, highest_rank: float = HIGHEST_RANK) -> None:
        self.module = shell(module)
        self._component = component
        self._count = count
        self._highest_rank = highest_rank
        self._changing = threading.Lock()
        self._rows = _Rows()
        self._tables: dict[str, _Table] = {}  # by the layer's name
        self._slots: OrderedDict[Hashable, int] = OrderedDict()  # key → slot, least recently released first
        self._free = list(range(count, NO_ADAPTER, -1))
        self._users: Counter[int] = Counter()  # by slot

    @property
    def dtype(self) -> torch.dtype:
        """Returns the precision that the module computes in."""
        return next(self.module.parameters()).dtype

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the slots take beside the module's own."""
        with self._changing:
            return sum(table.nbytes for table in self._tables.values())

    def warm(self) -> list[Hashable]:
        """Returns the keys whose adapters are here; of the idle ones the first is the next to leave."""
        return list(self._slots)

    def fits(self, adapter: Adapter) -> bool:
        """Whether the adapter can ride here: no rank is too high, and every layer is a plain one."""
        return all(
            delta.down.shape[0] <= self._highest_rank and (delta.layer in self._tables or _is_plain(self.module, delta))
            for delta in self._deltas(adapter).values()
        )

    def acquire(self, adapter: Adapter) -> int:
        """Returns the slot of the adapter, copying it there if need be. It is the caller's until `release`.

        Only what it changes in this module counts; without any such change the slot is NO_ADAPTER.

        Raises:
            SlotsFull: as many other adapters are in use as there are slots.
            NotForSlots: it does not fit.
        """
        deltas = self._deltas(adapter)
        if not deltas:
            return NO_ADAPTER
        if not self.fits(adapter):
            raise NotForSlots(f"a rank is over {self._highest_rank}, or a layer is of an unusual kind")
        with self._changing:
            if adapter.key not in self._slots:
                self._copy_in(adapter.key, deltas)
            slot = self._slots[adapter.key]
            self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Ends one use of the slot. Its adapter stays until the slot is needed, or leaves now if it was dropped."""
        if slot == NO_ADAPTER:
            return
        with self._changing:
            if not self._users[slot]:
                raise ValueError(f"slot {slot} is not in use")
            self._users[slot] -= 1
            if keys := [key for key, held in self._slots.items() if held == slot]:
                self._slots.move_to_end(keys[0])
            elif not self._users[slot]:
                self._erase(slot)

    def drop(self, adapter: Adapter) -> None:
        """Forgets an adapter, if it is here, and erases it as soon as nobody uses it."""
        with self._changing:
            slot = self._slots.pop(adapter.key, NO_ADAPTER)
            if slot != NO_ADAPTER and not self._users[slot]:
                self._erase(slot)

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Inside, row i of every batch that the module is given is changed by the adapter in `slots[i]`.

        Raises:
            ValueError: nobody has acquired one of the slots, or the block stands in another.
        """
        if unknown := [slot for slot in slots if slot != NO_ADAPTER and not self._users[slot]]:
            raise ValueError(f"slot {unknown[0]} is not in use")
        if self._rows.index is not None:
            raise ValueError("the rows of a forward are chosen already")
        if any(slots):
            self._rows.index = torch.tensor(slots, device=next(self.module.parameters()).device)
        try:
            yield
        finally:
            self._rows.index = None

    def _deltas(self, adapter: Adapter) -> dict[str, LayerDelta]:
        return {delta.layer: delta for delta in adapter.deltas if delta.component == self._component}

    def _copy_in(self, key: Hashable, deltas: dict[str, LayerDelta]) -> None:
        idle = [held for held, slot in self._slots.items() if not self._users[slot]]
        if not (self._free or idle):
            raise SlotsFull(f"all {self._count} slots are in use")
        if not self._free:
            self._free.append(self._slots.pop(idle[0]))
        slot = self._free[-1]
        for layer in deltas.keys() - self._tables.keys():
            self._wrap(layer)
        for name, table in self._tables.items():
            delta = deltas.get(name)
            table.make_room(slot, delta.down.shape[0] if delta else 0)
            table.write(slot, delta)
        self._slots[key] = self._free.pop()  # not before the copy is whole

    def _wrap(self, name: str) -> None:
        table = _Table(self.module.get_submodule(name), self._count + 1, self._rows)  # type: ignore[arg-type]
        self._tables[name] = table  # first: `fits` may look meanwhile
        self._put(name, _slotted(table))

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        self.module.get_submodule(parent)._modules[own] = layer

    def _erase(self, slot: int) -> None:
        for table in self._tables.values():
            table.write(slot, None)
        self._free.append(slot)


def _is_plain(module: nn.Module, delta: LayerDelta) -> bool:
    layer = module.get_submodule(delta.layer)
    # Exactly: a subclass may compute something else.
    return type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    )


def _slotted(table: _Table) -> Layer:
    """Returns a layer that does what `table.bare` does, with the same parameters and hooks, and adds the table's."""
    kind: type[Layer] = _SlottedLinear if isinstance(table.bare, nn.Linear) else _SlottedConv2d
    layer = kind.__new__(kind)
    # Not by __init__: it would make parameters, which accelerate puts on "meta" while another thread loads a model.
    layer.__dict__.update(table.bare.__dict__, table=table)
    return layer


def _zeros(like: Tensor, *shape: int) -> Tensor:
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
