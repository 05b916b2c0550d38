"""`SequenceTables`: a model's block table and token table, in shared memory. No torch but in torch_views."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from muxserve.engine.groups import BlockIds
from muxserve.engine.memory import Memfd
from muxserve.engine.spec import KVLayout

if TYPE_CHECKING:
    from torch import Tensor


class TablesError(Exception):
    """`NoFreeSlot`, or books that do not balance."""


class NoFreeSlot(TablesError):
    """All slots have an owner."""


class TableViews:
    """Both tables as a process that does not own them sees them: an executor.

    blocks: int32 `[layers, slots, kv_heads, spans]`, block ids, -1 = not allocated; written by the owner.
    tokens: int32 `[slots, context]`; prompts are written by the owner, sampled tokens by executors.
    """

    def __init__(self, memory: Memfd, layout: KVLayout, slots: int, context: int) -> None:
        self.layout = layout
        self.slots = slots
        self.context = context
        self._memory = memory
        shape = (layout.layers, slots, layout.kv_heads, layout.spans(context))
        words = memory.data.view(np.int32)
        cut = int(np.prod(shape))
        self.blocks: NDArray[np.int32] = words[:cut].reshape(shape)
        self.tokens: NDArray[np.int32] = words[cut:].reshape(slots, context)

    @classmethod
    def attach(cls, fd: int, layout: KVLayout, slots: int, context: int) -> TableViews:
        """Map the owner's tables; the caller may close `fd` at once. Raises ValueError for another size."""
        return cls(Memfd.attach(fd, table_bytes(layout, slots, context)), layout, slots, context)

    def torch_views(self) -> tuple[Tensor, Tensor]:
        """(`blocks`, `tokens`) as tensors over the same memory. Imports torch."""
        import torch  # executors only

        return torch.from_numpy(self.blocks), torch.from_numpy(self.tokens)

    def close(self) -> None:
        """Let go of the tables; a second call does nothing. The memory goes with the last view of it."""
        self.blocks = np.empty((0, 0, 0, 0), dtype=np.int32)
        self.tokens = np.empty((0, 0), dtype=np.int32)
        self._memory.close()


class SequenceTables(TableViews):
    """The owner's side (the worker's): which sequence has which slot, and which block groups are in its row.

    Touches `slots * (spans * blocks_per_span + context) * 4` bytes, since a block table starts as -1.
    Not safe for threads.
    """

    def __init__(self, memory: Memfd, layout: KVLayout, slots: int, context: int) -> None:
        super().__init__(memory, layout, slots, context)
        self.blocks.fill(-1)
        self._free = list(range(slots - 1, -1, -1))
        self._owners: dict[int, Hashable] = {}
        self._spans = [0] * slots  # per slot: spans [0, n) may hold ids, the others are -1

    @classmethod
    def create(cls, layout: KVLayout, slots: int, context: int) -> SequenceTables:
        """Tables for `slots` sequences of up to `context` tokens. ValueError for a size that is not positive,
        OSError if there is no memory."""
        if slots < 1 or context < 1 or layout.tokens_per_block < 1:
            raise ValueError(
                f"tables of {slots} slots, {context} tokens, {layout.tokens_per_block} per block"
            )
        memory = Memfd.create("muxserve-tables", table_bytes(layout, slots, context))
        return cls(memory, layout, slots, context)

    @property
    def fd(self) -> int:
        """To be passed to executors."""
        return self._memory.fd

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def acquire(self, owner: Hashable) -> int:
        """A slot for one sequence, its block row all -1. Raises NoFreeSlot."""
        if not self._free:
            raise NoFreeSlot(f"all {self.slots} slots are taken")
        slot = self._free.pop()
        self._owners[slot] = owner
        return slot

    def release(self, slot: int) -> None:
        """Clear the slot and let others have it. Raises KeyError if nobody has it."""
        del self._owners[slot]
        self.clear(slot)
        self._free.append(slot)

    def owner(self, slot: int) -> Hashable:
        """Who acquired the slot. Raises KeyError if nobody has."""
        return self._owners[slot]

    def assign(self, slot: int, first_span: int, ids: ArrayLike) -> None:
        """Enter groups `[n, blocks_per_span]` as spans `[first_span, first_span + n)` of `slot`. IndexError
        if there are not so many spans."""
        rows = np.asarray(ids, dtype=np.int32)
        end = first_span + len(rows)
        if first_span < 0 or end > self.blocks.shape[3]:
            raise IndexError(f"spans [{first_span}, {end}) of {self.blocks.shape[3]}")
        shaped = rows.reshape(-1, self.layout.layers, self.layout.kv_heads)
        self.blocks[:, slot, :, first_span:end] = shaped.transpose(1, 2, 0)
        self._spans[slot] = max(self._spans[slot], end)

    def extend(self, slots: ArrayLike, spans: ArrayLike, ids: ArrayLike) -> None:
        """One group to each of n sequences: row i of `ids` `[n, blocks_per_span]`: `spans[i]` of `slots[i]`.
        Raises IndexError if there is no such slot or span."""
        rows = np.asarray(ids, dtype=np.int32).reshape(-1, self.layout.layers, self.layout.kv_heads)
        where, at = np.asarray(slots, dtype=np.intp), np.asarray(spans, dtype=np.intp)
        if at.size and at.min() < 0:
            raise IndexError("a negative span")
        self.blocks[:, where, :, at] = rows
        for slot, span in zip(where.tolist(), at.tolist(), strict=True):
            self._spans[slot] = max(self._spans[slot], span + 1)

    def groups(self, slot: int, spans: int) -> BlockIds:
        """The groups of the slot's first `spans` spans, int32 `[spans, blocks_per_span]`, a copy."""
        rows = self.blocks[:, slot, :, :spans].transpose(2, 0, 1)
        return rows.reshape(-1, self.layout.blocks_per_span).copy()

    def clear(self, slot: int) -> None:
        """Forget the slot's blocks; its tokens stay until they are written over."""
        self.blocks[:, slot, :, : self._spans[slot]] = -1
        self._spans[slot] = 0

    def check_integrity(self) -> None:
        """Raises TablesError unless each slot is free or owned, and empty where nothing was assigned."""
        if sorted([*self._free, *self._owners]) != list(range(self.slots)):
            raise TablesError("free and owned slots do not add up")
        for slot, spans in enumerate(self._spans):
            if slot not in self._owners and spans:
                raise TablesError(f"slot {slot} has no owner but {spans} spans")
            if (self.blocks[:, slot, :, spans:] != -1).any():
                raise TablesError(f"slot {slot} has blocks past its {spans} spans")


def table_bytes(layout: KVLayout, slots: int, context: int) -> int:
    """Size of both tables of a model."""
    return slots * (layout.blocks_per_span * layout.spans(context) + context) * np.dtype(np.int32).itemsize
