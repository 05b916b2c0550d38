"""`PrefixIndex`: which block group holds which span, for `BlockPool` alone. Numpy, no torch."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.groups import BlockIds


@dataclass(frozen=True, slots=True)
class _Prefix:
    model: int
    span_hash: Hashable
    ids: BlockIds
    """`[blocks_per_span]`."""


class PrefixIndex:
    """Hash of a span → block group, per model. A group in the index is held, or *resting* (cached): without a
    holder, and evicted when memory is needed, least recently used first across all models.

    Groups are named by their first block. `published`: bool `[blocks]`, true where an indexed group begins.
    """

    def __init__(self, blocks: int) -> None:
        self.published = np.zeros(blocks, dtype=np.bool_)
        self.cached_blocks = 0
        self._by_hash: dict[tuple[int, Hashable], _Prefix] = {}
        self._by_head: dict[int, _Prefix] = {}
        self._resting: OrderedDict[int, _Prefix] = OrderedDict()
        self._cached_of: Counter[int] = Counter()

    def cached_of(self, model: int) -> int:
        """Blocks of the resting groups of `model`."""
        return self._cached_of[model]

    def add(self, model: int, span_hash: Hashable, ids: BlockIds) -> bool:
        """Index a held group. False if the hash or the group is indexed already."""
        head = int(ids[0])
        if (model, span_hash) in self._by_hash or head in self._by_head:
            return False
        prefix = _Prefix(model, span_hash, ids.copy())
        self._by_hash[model, span_hash] = self._by_head[head] = prefix
        self.published[head] = True
        return True

    def known(self, model: int, hashes: Sequence[Hashable]) -> Iterator[BlockIds]:
        """Groups of `hashes`, up to the first that is not known."""
        for span_hash in hashes:
            prefix = self._by_hash.get((model, span_hash))
            if prefix is None:
                return
            yield prefix.ids

    def rest(self, heads: NDArray[np.int32]) -> None:
        """These groups lost their last holder. Given in a sequence's order, the first is evicted last."""
        for head in reversed(heads.tolist()):
            prefix = self._by_head[head]
            self._resting[head] = prefix
            self._count(prefix, prefix.ids.size)

    def revive(self, head: int) -> None:
        """A resting group has a holder again."""
        prefix = self._resting.pop(head)
        self._count(prefix, -prefix.ids.size)

    def withdraw(self, head: int) -> None:
        """Forget a group that is held."""
        prefix = self._by_head.pop(head)
        del self._by_hash[prefix.model, prefix.span_hash]
        self.published[head] = False

    def evict(self) -> BlockIds:
        """Forget the least recently used resting group; `[1, blocks_per_span]`. KeyError if there is none."""
        _, prefix = self._resting.popitem(last=False)
        return self._forget(prefix)

    def drop_model(self, model: int) -> Iterator[BlockIds]:
        """Forget all resting groups of `model`, as `evict` does."""
        for head, prefix in list(self._resting.items()):
            if prefix.model == model:
                del self._resting[head]
                yield self._forget(prefix)
        del self._cached_of[model]

    def faults(self, owner: NDArray[np.int32], cached: NDArray[np.int64]) -> Iterator[str]:
        """What disagrees with the pool: `owner` per block, `cached` = first blocks without a holder."""
        if sorted(self._resting) != cached.tolist():
            yield "groups without references and cached groups differ"
        if sorted(self._by_head) != np.flatnonzero(self.published).tolist():
            yield "published groups and indexed groups differ"
        by_hash = {id(prefix) for prefix in self._by_hash.values()}
        if by_hash != {id(prefix) for prefix in self._by_head.values()}:
            yield "the index by hash and the index by block differ"
        if any(owner[head] != prefix.model for head, prefix in self._by_head.items()):
            yield "an indexed group belongs to another model"
        counted: Counter[int] = Counter()
        for prefix in self._resting.values():
            counted[prefix.model] += prefix.ids.size
        if counted != self._cached_of or counted.total() != self.cached_blocks:
            yield f"cached blocks: {self.cached_blocks}, counted {counted.total()}"

    def _count(self, prefix: _Prefix, blocks: int) -> None:
        self._cached_of[prefix.model] += blocks
        self.cached_blocks += blocks

    def _forget(self, prefix: _Prefix) -> BlockIds:
        self.withdraw(int(prefix.ids[0]))
        self._count(prefix, -prefix.ids.size)
        return prefix.ids.reshape(1, -1)
