"""`BlockGroups`: which block is in which block group, and which are free; for `BlockPool` alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BlockIds = NDArray[np.int32]
"""int32 `[groups, blocks_per_span]`; a row is one block group, its blocks in (layer, kv_head) order."""


class BlockGroups:
    """A free stack, and for each group its blocks, its owner (a number) and its count of references.

    References are counted once per group: its blocks are allocated, shared and freed together, so one count
    says all, and a sequence of 1,000 blocks costs a dozen. A group is named by its first block.

    owner, references: int32 `[blocks]`, of a group at its first block; -1 and 0 anywhere else.
    """

    def __init__(self, blocks: int) -> None:
        if not 0 < blocks <= np.iinfo(np.int32).max:
            raise ValueError(f"blocks: {blocks} is not between 1 and 2**31 - 1")
        self.blocks = blocks
        self.free = blocks
        self.owner = np.full(blocks, -1, dtype=np.int32)
        self.references = np.zeros(blocks, dtype=np.int32)
        # Last in, first out: memory that was touched lately is used again, and an arena of which little is
        # used has few pages. The top is at `free - 1`; the lowest ids are on top at first.
        self._stack = np.arange(blocks - 1, -1, -1, dtype=np.int32)
        # Per block: the first block of its group (-1 = free), and its place in that group.
        self._head = np.full(blocks, -1, dtype=np.int32)
        self._place = np.zeros(blocks, dtype=np.int32)

    def take(self, owner: int, groups: int, blocks_per_span: int) -> BlockIds:
        """New groups with one reference each. The caller has seen to it that so many blocks are free."""
        top = self.free
        self.free = top - groups * blocks_per_span
        # Reversed, so that a fresh pool gives ascending ids; copied, since the stack will be written over.
        ids = self._stack[self.free : top][::-1].reshape(groups, blocks_per_span).copy()
        heads = ids[:, 0]
        self._head[ids] = ids[:, :1]
        self._place[ids] = np.arange(blocks_per_span, dtype=np.int32)
        self.owner[heads] = owner
        self.references[heads] = 1
        return ids

    def release(self, rows: BlockIds) -> None:
        """Put groups without references on the free stack."""
        self.owner[rows[:, 0]] = -1
        self._head[rows] = -1
        self._stack[self.free : self.free + rows.size] = rows.ravel()[::-1]
        self.free += rows.size

    def held(self, owner: int, blocks_per_span: int, ids: ArrayLike) -> BlockIds:
        """`ids` as an array, if each row is one whole group of `owner` with a reference; else ValueError."""
        rows = np.asarray(ids, dtype=np.int32)
        if rows.size == 0:
            return rows.reshape(0, blocks_per_span)
        if rows.ndim != 2 or rows.shape[1] != blocks_per_span:
            raise ValueError(f"shape {rows.shape}, not [groups, {blocks_per_span}]")
        if rows.min() < 0 or rows.max() >= self.blocks:
            raise ValueError(f"not all in [0, {self.blocks})")
        heads = rows[:, :1]
        if (self.owner[heads] != owner).any() or (self.references[heads] == 0).any():
            raise ValueError("not all are held by that model")
        whole = self._place[rows] == np.arange(blocks_per_span, dtype=np.int32)
        if not (whole & (self._head[rows] == heads)).all():
            raise ValueError("a row is not the blocks of one group, in order")
        return rows

    def heads(self) -> NDArray[np.int64]:
        """First blocks of all groups, ascending."""
        return np.flatnonzero(self.owner >= 0)

    def faults(self, blocks_per_span: Mapping[int, int]) -> Iterator[str]:
        """What does not add up, given how large the groups of each owner are. O(blocks), without sorting."""
        head, used = self._head, np.flatnonzero(self._head >= 0)
        if not np.array_equal(_times(self._stack[: self.free], self.blocks), head < 0):
            yield "the free stack is not exactly the blocks of no group"
        sizes = _times(head[used], self.blocks)
        heads = np.flatnonzero(sizes)
        if not np.array_equal(heads, self.heads()):
            yield "groups in use and groups with an owner differ"
        expected = [blocks_per_span.get(owner, -1) for owner in self.owner[heads].tolist()]
        if sizes[heads].tolist() != expected:
            yield "a group has more or fewer blocks than its model's block group"
        # Laid out group after group, each block by its place: every position is then taken once.
        starts = np.cumsum(sizes) - sizes
        place = self._place[used]
        positions = starts[head[used]] + place
        if (place < 0).any() or not (_times(positions, used.size) == 1).all():
            yield "a group's blocks are not numbered from 0 on"
        elsewhere = head != np.arange(self.blocks)
        if (self.references < 0).any() or self.references[elsewhere].any():
            yield "a count of references is negative or not at the first block of a group"


def _times(numbers: NDArray[Any], size: int) -> NDArray[np.int64]:
    """How often each of `0 … size - 1` is among `numbers`; if others are, -1 everywhere."""
    if numbers.size and (numbers.min() < 0 or numbers.max() >= size):
        return np.full(size, -1)
    return np.bincount(numbers, minlength=size)
