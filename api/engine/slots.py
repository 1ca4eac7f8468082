"""Slots: many users' LoRAs in one module, each row of a forward changed by the one in its slot.

Slot 0 has no adapter. A new user is a copy into a slot: no module is built, and no buffer moves unless a layer meets a
higher rank than ever before.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from api.engine.adapters import Adapter, Delta, Norm
from api.engine.cache import AccountingOff
from api.engine.combined import is_made_of
from api.engine.slotted import RANKS, NormTable, Rows, Table, is_plain, slotted
from api.engine.weights import shell

NO_ADAPTER = 0
HIGHEST_RANK = RANKS[-1]  # that shares a forward with others


BUCKETS = (2, 4, 8, 16, 32, 64, 128, 256)  # numbers of rows that a forward is compiled for
BACKEND = "inductor"
RECOMPILE_LIMIT = 256  # of the UNet's forward: buckets × shapes × kinds of tables × ranks


class SlotsFull(Exception):
    """Every slot is in use: wait for a release. The batch's own matter, so no SitterError."""


class NotForSlots(Exception):
    """The adapter cannot ride in these slots; see `Slots.fits`."""


class Slots:
    """A fixed number of slots for adapters, in a module that is a copy of the base's and shares its weights.

    Adapters may be dropped by any thread; all else is for one thread at a time.

    Args:
        module: of the base; it stays as it is. The copy's layers are wrapped when the first adapter that changes them
            comes. A wrapper is a layer of the same kind that shares the bare one's dictionaries.
        component: its name in the base, as `LayerDelta` says it.
        count: how many adapters it holds at once; their slots are 1 … count.
        highest_rank: of adapters that it takes.
        compiled: whether `predict` runs compiled, once for each size of `BUCKETS` and shape of its inputs.
    """

    def __init__(
        self,
        module: nn.Module,
        component: str,
        count: int,
        highest_rank: float = HIGHEST_RANK,
        compiled: bool = False,
    ) -> None:
        self.module = shell(module)
        self._compiled = _compile(self.module) if compiled else None
        self._component = component
        self._count = count
        self._highest_rank = highest_rank
        self._changing = threading.Lock()
        self._rows = Rows()
        self._tables: dict[str, Table | NormTable] = {}  # by the layer's name
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
            return sum(tensor.nbytes for table in self._tables.values() for tensor in table.tensors())

    def warm(self) -> list[Hashable]:
        """Returns the keys whose adapters are here; of the idle ones the first is the next to leave."""
        return list(self._slots)

    def fits(self, adapter: Adapter) -> bool:
        """Whether the adapter can ride here: no rank is too high, and every layer is a plain one."""
        return all(
            delta.rank <= self._highest_rank and (layer in self._tables or is_plain(self.module.get_submodule(layer)))
            for layer, delta in adapter.of(self._component).items()
        )

    def acquire(self, adapter: Adapter) -> int:
        """Returns the slot of the adapter, copying it there if need be. It is the caller's until `release`.

        Only what it changes in this module counts; without any such change the slot is NO_ADAPTER.

        Raises:
            SlotsFull: as many other adapters are in use as there are slots.
            NotForSlots: it does not fit.
        """
        deltas = adapter.of(self._component)
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
        """Forgets an adapter and its combinations, if any is here, and erases each as soon as nobody uses it."""
        with self._changing:
            for key in [key for key in self._slots if is_made_of(key, adapter.key)]:
                slot = self._slots.pop(key)
                if not self._users[slot]:
                    self._erase(slot)

    def check(self) -> None:
        """Raises AccountingOff unless each slot is free, holds an adapter, or is used for one that was dropped."""
        with self._changing:
            held = [*self._slots.values()]
            dropped = {slot for slot, users in self._users.items() if users} - {*held}
            if sorted([*self._free, *held, *dropped]) != list(range(1, self._count + 1)):
                raise AccountingOff(f"of {self._count} slots {self._free} are free, {held} held, {dropped} dropped")

    def predict(self, slots: Sequence[int], latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Returns what the module, a UNet, says of every row, each changed by the adapter in its slot.

        Args:
            slots: see `rows`.
            latents: (rows, channels, height, width).
            timesteps: (rows,).
            text: (rows, tokens, width).

        Returns:
            (rows, channels, height, width) float32, nobody else's.
        """
        rows = len(slots)
        added = 0 if self._compiled is None else next((size for size in BUCKETS if size >= rows), rows) - rows
        inputs = [_with_more(part, added) for part in (latents, timesteps, text)]
        forward: Callable[..., Any] = self.module
        if self._compiled is not None:
            # Here: it is a setting of this thread, and beyond it all would silently run as it is.
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            forward = self._compiled
        with self.rows([*slots, *[NO_ADAPTER] * added], always=self._compiled is not None):
            said: Tensor = forward(*inputs, return_dict=False)[0]
        return said[:rows].to(torch.float32, copy=True)  # a CUDA graph writes over what it has returned

    def run_plain(self) -> None:
        """Has `predict` run without compiling from now on."""
        self._compiled = None

    @contextmanager
    def rows(self, slots: Sequence[int], always: bool = False) -> Iterator[None]:
        """Inside, row i of every batch that the module is given is changed by the adapter in `slots[i]`.

        Rows that all have NO_ADAPTER run as if there were no slots; `always` adds their zeros all the same, so that
        there is but one way to be compiled.

        Raises:
            ValueError: nobody has acquired one of the slots, or the block stands in another.
        """
        if unknown := [slot for slot in slots if slot != NO_ADAPTER and not self._users[slot]]:
            raise ValueError(f"slot {unknown[0]} is not in use")
        if self._rows.index is not None:
            raise ValueError("the rows of a forward are chosen already")
        if any(slots) or always:
            self._rows.index = torch.tensor(slots, device=next(self.module.parameters()).device)
        try:
            yield
        finally:
            self._rows.index = None

    def _copy_in(self, key: Hashable, deltas: dict[str, Delta]) -> None:
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
            table.make_room(slot, delta.rank if delta else 0)
            table.write(slot, delta)
        self._slots[key] = self._free.pop()  # not before the copy is whole

    def _wrap(self, name: str) -> None:
        bare: Any = self.module.get_submodule(name)
        table: Table | NormTable
        if isinstance(bare, Norm):
            table = NormTable(bare, self._count + 1, self._rows)
        else:
            table = Table(bare, self._count + 1, self._rows, shrinks=self._compiled is None)
        self._tables[name] = table  # first: `fits` may look meanwhile
        self._put(name, slotted(table))

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        self.module.get_submodule(parent)._modules[own] = layer

    def _erase(self, slot: int) -> None:
        for table in self._tables.values():
            table.write(slot, None)
        self._free.append(slot)


def _with_more(part: Tensor, rows: int) -> Tensor:
    return torch.cat([part, part[-1:].expand(rows, *part.shape[1:])]) if rows else part


def _compile(module: nn.Module) -> Callable[..., Any]:
    """Returns a compiled forward of `module`; on CUDA its kernels are recorded as one graph and replayed."""
    on_cuda = next(module.parameters()).is_cuda
    return torch.compile(module, dynamic=False, mode="reduce-overhead" if on_cuda else None, backend=BACKEND)
