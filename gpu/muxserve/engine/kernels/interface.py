"""The small interface behind which attention kernels live. Two operations: write KV, attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from muxserve.engine.spec import KVLayout


@dataclass(frozen=True, slots=True)
class KVCache:
    """One model's view of the arena.

    blocks: `[num_blocks, 2, tokens_per_block, head_dim]` in the KV dtype, a strided view of the whole arena
        (stride of axis 0 is `block_bytes / itemsize`); block ids of every model index the same memory.
    table: int32 `[layers, slots, kv_heads, spans]`, block ids, -1 = not allocated.
    """

    blocks: Tensor
    table: Tensor
    layout: KVLayout

    @staticmethod
    def over(arena: Tensor, table: Tensor, layout: KVLayout) -> KVCache:
        """View `arena` (uint8 `[bytes]`) as this model's blocks, without a copy."""
        typed = arena.view(getattr(torch, layout.dtype))
        stride = layout.block_bytes // typed.element_size()
        tokens, dim = layout.tokens_per_block, layout.head_dim
        shape = (arena.numel() // layout.block_bytes, 2, tokens, dim)
        return KVCache(typed.as_strided(shape, (stride, tokens * dim, dim, 1)), table, layout)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """S sequences whose N query tokens lie one after another along the token axis.

    Decode is the case of one query token per sequence (`max_query == 1`), prefill any other, with or without
    history: a sequence's keys are positions `[0, context_lengths[s])`, its queries the last ones of those.

    slots: int64 `[S]`; query_starts: int64 `[S + 1]`, prefix sums of query lengths; context_lengths: int64
    `[S]`, history plus this batch's own tokens; positions: int64 `[N]`; token_slots: int64 `[N]`, each
    token's slot.
    """

    slots: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    positions: Tensor
    token_slots: Tensor
    max_query: int
    max_context: int


class AttentionKernels(Protocol):
    """Kernels over head-wise blocks. Stateless; free or unwritten blocks may hold any bytes, NaN included."""

    def write(self, cache: KVCache, layer: int, batch: RaggedBatch, key: Tensor, value: Tensor) -> None:
        """Store `key` and `value`, `[N, kv_heads, head_dim]`, at the batch's positions."""

    def attend(
        self,
        cache: KVCache,
        layer: int,
        batch: RaggedBatch,
        query: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """Causal attention of `query` `[N, heads, head_dim]` over the cache; same shape and dtype out.

        Scores are `query · key * scale`, then `soft_cap * tanh(score / soft_cap)` if given; a query at
        position p sees keys `j <= p` with `p - j < window`. Head h reads KV head `h // (heads / kv_heads)`.
        Accumulates in float32.
        """
