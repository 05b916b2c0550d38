"""`PrefixCache`: spans of prompts that were computed before, taken instead of computed again.

The pool keeps the index: hash of a span → block group. The hash of a span covers the name of the model, its
layout, and all tokens up to the end of the span; each is made from the one before. So equal hashes mean
equal KV, and a prefix is found span by span, with one pass over its tokens.

A sequence never writes to a span that it has taken or published: it writes at positions from `computed` on,
and both end at or before the span in which that lies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from muxserve.engine.pool import BlockPool
from muxserve.engine.spec import KVLayout

if TYPE_CHECKING:
    from muxserve.worker.sequences import Sequence

HASH_BYTES = 16
TOKEN_BYTES = 4
"""Of a token in the token table."""


@dataclass(slots=True)
class PrefixCounts:
    """Of one model, since it was loaded."""

    queried: int = 0
    """Tokens of the chunks for which the cache was asked."""
    hit: int = 0
    """How many of them it had."""


class PrefixCache:
    """What of a sequence is taken from the pool's index and what is published there.

    enabled: False: nothing is ever taken or published. outputs: whether a sequence's output is published when
    it is closed, too. Prefill adds up attention in another order than decode does, so what follows a prefix
    whose KV decode steps have written may differ in its last bits from what a cold run gives; without
    outputs, results are the same bit for bit.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool = True, outputs: bool = False) -> None:
        self._pool = pool
        self._enabled = enabled
        self._outputs = outputs

    def take(self, sequence: Sequence, end: int, *, borrow: bool) -> None:
        """Have a sequence that has a slot, and is about to compute up to position `end`, hold the spans that
        are known from `computed` on, as far as they begin before `end`; `computed` is then where they end.

        At least two known tokens are left to be computed: the last one is sampled from, and a chunk of one
        token alone would go through the arithmetic of a decode step, and differ in its last bits.
        """
        size = sequence.model.shape.layout.tokens_per_block
        first = self._next_span(sequence)
        last = min(-(-end // size), (sequence.known - 2) // size)
        if first is None or last <= first:
            return
        name = sequence.model.name
        ids = self._pool.lookup(name, self._hashes(sequence, last)[first:last], borrow=borrow)
        if len(ids) and end - (first + len(ids)) * size == 1:
            self._pool.free(name, ids[-1:])
            ids = ids[:-1]
        if len(ids):
            sequence.model.tables.assign(sequence.slot, first, ids)
            sequence.spans = sequence.published = first + len(ids)
            sequence.computed = sequence.spans * size

    def common(self, sequence: Sequence, end: int, coming: Collection[bytes]) -> int:
        """Tokens from `computed` on that are in spans of `coming`: what somebody else is about to compute."""
        first = self._next_span(sequence)
        size = sequence.model.shape.layout.tokens_per_block
        last = min(-(-end // size), (sequence.known - 2) // size)
        if not coming or first is None or last <= first:
            return 0
        spans = 0
        for span_hash in self._hashes(sequence, last)[first:last]:
            if span_hash not in coming:
                break
            spans += 1
        return spans * size

    def coming(self, sequence: Sequence, end: int) -> list[bytes]:
        """Hashes of the spans that will be published when the sequence is computed up to `end`."""
        if not self._enabled:
            return []
        spans = end // sequence.model.shape.layout.tokens_per_block
        return self._hashes(sequence, spans)[sequence.published : spans]

    def publish(self, sequence: Sequence) -> None:
        """Index the spans that are written whole. For a sequence whose last job has ended as it should."""
        spans = sequence.computed // sequence.model.shape.layout.tokens_per_block
        if not self._enabled or sequence.tainted or spans <= sequence.published:
            return
        first, sequence.published = sequence.published, spans
        ids = sequence.model.tables.groups(sequence.slot, spans)[first:]
        self._pool.publish(sequence.model.name, self._hashes(sequence, spans)[first:spans], ids)

    def publish_output(self, sequence: Sequence) -> None:
        """The same for a sequence that is about to be closed, if outputs are to be published."""
        if self._outputs:
            self.publish(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Something is wrong with this sequence's KV: nobody else is to have any of it."""
        sequence.tainted = True
        if sequence.spans:
            ids = sequence.model.tables.groups(sequence.slot, sequence.spans)
            self._pool.withdraw(sequence.model.name, ids)

    def _next_span(self, sequence: Sequence) -> int | None:
        """The span with which taking could go on; None: not now, it is in the middle of one."""
        spans, into = divmod(sequence.computed, sequence.model.shape.layout.tokens_per_block)
        return spans if self._enabled and not into and spans == sequence.spans else None

    def _hashes(self, sequence: Sequence, spans: int) -> list[bytes]:
        """Hashes of at least the first `spans` spans, all of whose tokens are known."""
        hashes = sequence.hashes
        if len(hashes) < spans:
            layout = sequence.model.shape.layout
            step = layout.tokens_per_block * TOKEN_BYTES
            row = sequence.model.tables.tokens[sequence.slot]
            data = row[len(hashes) * layout.tokens_per_block : spans * layout.tokens_per_block].tobytes()
            chain = hashes[-1] if hashes else _root(sequence.model.name, layout)
            for at in range(0, len(data), step):
                chain = blake2b(chain + data[at : at + step], digest_size=HASH_BYTES).digest()
                hashes.append(chain)
        return hashes


@lru_cache(maxsize=256)
def _root(model: str, layout: KVLayout) -> bytes:
    """What the hash of a first span begins with."""
    return blake2b(f"{model}\0{layout!r}".encode(), digest_size=HASH_BYTES).digest()
