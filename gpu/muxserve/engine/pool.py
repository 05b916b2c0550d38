"""`BlockPool`: who holds which block of an arena. Bookkeeping only: numpy, no torch, CUDA or clock."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from muxserve.engine.groups import BlockGroups, BlockIds
from muxserve.engine.prefixes import PrefixIndex
from muxserve.engine.spec import KVLayout


class PoolError(Exception):
    """What goes wrong with a pool.

    PoolError
    ├── OutOfBlocks         the pool or the quota does not allow the allocation
    ├── InvalidGroups       ids that the model does not hold: double free, another model's
    ├── ModelBusy           `unregister` of a model that holds blocks, `register` of a known one
    └── PoolIntegrityError  the pool's own books do not balance: a bug
    """


class OutOfBlocks(PoolError):
    """`wanted` and `available` count blocks. limit "pool": they are not there, whoever asks, and `borrowers`
    says who holds how many above quota; "quota": they are there, but `model` would have to borrow."""

    def __init__(
        self,
        model: str,
        wanted: int,
        available: int,
        limit: Literal["pool", "quota"],
        borrowers: dict[str, int],
    ) -> None:
        super().__init__(f"model {model!r} wants {wanted} blocks, {available} are available (limit: {limit})")
        self.model = model
        self.wanted = wanted
        self.available = available
        self.limit = limit
        self.borrowers = borrowers


class InvalidGroups(PoolError, ValueError):
    """Block ids that are not block groups held by that model."""


class ModelBusy(PoolError):
    """The model's state forbids the call."""


class PoolIntegrityError(PoolError):
    """The message lists everything found wrong."""


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model's blocks at this moment. `held` counts a shared group once; `borrowed`: those above quota;
    `peak`: the most held since `register`; `cached`: free for anyone, but holding this model's prefixes."""

    blocks_per_span: int
    quota: int
    held: int
    borrowed: int
    peak: int
    cached: int


@dataclass(slots=True)
class _Model:
    name: str
    index: int
    blocks_per_span: int
    quota: int
    held: int = 0
    peak: int = 0


class BlockPool:
    """Blocks `0 … blocks - 1`. A block is free, held, or cached; free + held + cached = blocks.

    A group is *held* while it has references. Without any it goes back to the free stack or, if it was
    published to the prefix index, becomes *cached*: free memory for any model, taken back group by group,
    least recently used first, when the stack alone cannot serve an allocation.

    Quotas: within its quota a model gets any free block. Above it, only with `borrow=True`, and then any free
    block too: what others' quotas leave unused is not kept back for them, since that would be the static
    partition that this pool replaces. So a model within its quota may find the pool empty; `OutOfBlocks` then
    names the borrowers, and the scheduler preempts their sequences first.

    A method that names a model raises KeyError if it is not registered. A method that raises has changed
    nothing. Not safe for threads: one owner, the worker's event loop.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._groups = BlockGroups(blocks)
        self._models: dict[str, _Model] = {}
        self._next_index = 0
        self._prefixes = PrefixIndex(blocks)

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return self._groups.free

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody holds but that the prefix index still knows."""
        return self._prefixes.cached_blocks

    @property
    def available_blocks(self) -> int:
        """Free + cached: what an allocation can get. Equals `blocks` when no sequence lives."""
        return self._groups.free + self._prefixes.cached_blocks

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the registered models."""
        return tuple(self._models)

    def use(self, model: str) -> ModelUse:
        """What `model` has now."""
        m = self._models[model]
        cached = self._prefixes.cached_of(m.index)
        return ModelUse(m.blocks_per_span, m.quota, m.held, max(0, m.held - m.quota), m.peak, cached)

    def borrowers(self) -> dict[str, int]:
        """Blocks above quota, of the models that have any."""
        return {m.name: m.held - m.quota for m in self._models.values() if m.held > m.quota}

    def register(self, model: str, layout: KVLayout, quota: int) -> None:
        """Let `model` allocate groups of `layout.blocks_per_span` blocks. Raises ModelBusy if it is known,
        ValueError for a negative quota or a layout whose block holds no token."""
        if model in self._models:
            raise ModelBusy(f"model {model!r} is registered already")
        if layout.blocks_per_span < 1 or layout.tokens_per_block < 1:
            raise ValueError(f"layout: a block of {layout.block_bytes} bytes holds no token of {model!r}")
        _check_quota(quota)
        self._models[model] = _Model(model, self._next_index, layout.blocks_per_span, quota)
        self._next_index += 1

    def unregister(self, model: str) -> None:
        """Forget `model` and its cached prefixes. Raises ModelBusy while it holds blocks."""
        m = self._models[model]
        if m.held:
            raise ModelBusy(f"model {model!r} still holds {m.held} blocks")
        for ids in self._prefixes.drop_model(m.index):
            self._groups.release(ids)
        del self._models[model]

    def set_quota(self, model: str, blocks: int) -> None:
        """May be below what the model holds: nothing is taken away, the excess counts as borrowed."""
        _check_quota(blocks)
        self._models[model].quota = blocks

    def allocate(self, model: str, groups: int, *, borrow: bool = False) -> BlockIds:
        """Give `model` new groups with one reference each: int32 `[groups, blocks_per_span]`, all or nothing.

        Evicts cached groups as needed. Raises OutOfBlocks.
        """
        m = self._models[model]
        if groups < 0:
            raise ValueError(f"groups: {groups} is negative")
        wanted = groups * m.blocks_per_span
        self._admit(m, wanted, borrow)
        while self._groups.free < wanted:
            self._groups.release(self._prefixes.evict())
        self._hold(m, wanted)
        return self._groups.take(m.index, groups, m.blocks_per_span)

    def share(self, model: str, ids: ArrayLike) -> None:
        """One more reference to each of these groups, which `model` must hold (else InvalidGroups)."""
        rows = self._held(self._models[model], ids)
        np.add.at(self._groups.references, rows[:, 0], 1)

    def free(self, model: str, ids: ArrayLike) -> None:
        """Give back one reference to each of these groups; without any they are free, or cached if published.

        Free a sequence's groups in one call, in order: its first span is then evicted after its later ones,
        which are of no use without it. Raises InvalidGroups.
        """
        m = self._models[model]
        rows = self._held(m, ids)
        # A group may be named twice, once for each of its references.
        heads, first, times = np.unique(rows[:, 0], return_index=True, return_counts=True)
        left = self._groups.references[heads] - times
        if (left < 0).any():
            raise InvalidGroups(
                f"group {heads[left < 0][0]} of {model!r} is freed more often than it is held"
            )
        self._groups.references[heads] = left
        gone = rows[np.sort(first[left == 0])]
        m.held -= gone.size
        published = self._prefixes.published[gone[:, 0]]
        if published.any():
            self._prefixes.rest(gone[published, 0])
            gone = gone[~published]
        self._groups.release(gone)

    def publish(self, model: str, hashes: Sequence[Hashable], ids: ArrayLike) -> int:
        """Index held groups, full, never written again, by the hash of their span; returns how many were new.

        `hashes[i]` must cover all tokens up to and including span i. What is indexed already stays as it is:
        of two sequences that computed the same prefix, the second keeps a copy that is freed, not cached.
        Raises InvalidGroups, or ValueError if there are not as many hashes as groups.
        """
        m = self._models[model]
        rows = self._held(m, ids)
        if len(hashes) != len(rows):
            raise ValueError(f"hashes: {len(hashes)} of them for {len(rows)} groups")
        return sum(self._prefixes.add(m.index, h, row) for h, row in zip(hashes, rows, strict=True))

    def withdraw(self, model: str, ids: ArrayLike) -> None:
        """Take held groups out of the index, as far as they are there: nobody will find them any more, and
        they are free when their last holder gives them back. Raises InvalidGroups."""
        for head in self._held(self._models[model], ids)[:, 0].tolist():
            if self._prefixes.published[head]:
                self._prefixes.withdraw(head)

    def references(self, head: int) -> int:
        """Holders of the group that begins with block `head`; 0 where none does."""
        return int(self._groups.references[head])

    def private(self, head: int) -> bool:
        """Whether the group that begins with block `head` has one holder and is not in the index: whether
        that holder may write to it."""
        return bool(self.references(head) == 1 and not self._prefixes.published[head])

    def lookup(self, model: str, hashes: Sequence[Hashable], *, borrow: bool = False) -> BlockIds:
        """The groups of the longest known prefix of `hashes`, with a reference to each for the caller.

        Reviving a cached group takes memory, so the quota bounds it as in `allocate`; the prefix ends there.
        """
        m = self._models[model]
        found: list[BlockIds] = []
        for ids in self._prefixes.known(m.index, hashes):
            if self._groups.references[ids[0]] == 0:
                if not borrow and m.held + m.blocks_per_span > m.quota:
                    break
                self._prefixes.revive(int(ids[0]))
                self._hold(m, m.blocks_per_span)
            self._groups.references[ids[0]] += 1
            found.append(ids)
        return np.array(found, dtype=np.int32).reshape(len(found), m.blocks_per_span)

    def check_integrity(self) -> None:
        """Recount everything, in O(blocks): when idle, and after tests. Raises PoolIntegrityError."""
        wrong = list(self._faults())
        if wrong:
            raise PoolIntegrityError("; ".join(wrong))

    def _admit(self, m: _Model, wanted: int, borrow: bool) -> None:
        available = self.available_blocks
        room = available if borrow else min(available, max(0, m.quota - m.held))
        if wanted > room:
            limit: Literal["pool", "quota"] = "pool" if wanted > available else "quota"
            raise OutOfBlocks(m.name, wanted, room, limit, self.borrowers())

    def _hold(self, m: _Model, blocks: int) -> None:
        m.held += blocks
        m.peak = max(m.peak, m.held)

    def _held(self, m: _Model, ids: ArrayLike) -> BlockIds:
        """`ids` as an array, if each row is one whole group that `m` holds."""
        try:
            return self._groups.held(m.index, m.blocks_per_span, ids)
        except ValueError as error:
            raise InvalidGroups(f"ids of model {m.name!r}: {error}") from None

    def _faults(self) -> Iterator[str]:
        groups = self._groups
        yield from groups.faults({m.index: m.blocks_per_span for m in self._models.values()})
        heads = groups.heads()
        has_holder = groups.references[heads] > 0
        yield from self._prefixes.faults(groups.owner, heads[~has_holder])
        total = self.available_blocks
        for m in self._models.values():
            total += m.held
            counted = int((groups.owner[heads[has_holder]] == m.index).sum()) * m.blocks_per_span
            if counted != m.held or m.peak < m.held:
                yield f"model {m.name!r}: held {m.held}, peak {m.peak}, counted {counted}"
        if total != self.blocks:
            yield f"free + held + cached = {total}, not {self.blocks}"


def _check_quota(blocks: int) -> None:
    if blocks < 0:
        raise ValueError(f"quota: {blocks} is negative")
