"""`ReferenceKernels`: attention over blocks in plain torch, the yardstick of every other implementation.

One token, one head at a time where that is clearest; nothing here is meant to be fast. Any device, any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache, RaggedBatch


class ReferenceKernels:
    """Implements `AttentionKernels`: copies a sequence's KV out of its blocks and spells the formula out."""

    def write(self, cache: KVCache, layer: int, batch: RaggedBatch, key: Tensor, value: Tensor) -> None:
        """See `AttentionKernels.write`."""
        tokens_per_block = cache.layout.tokens_per_block
        for n in range(key.shape[0]):
            span, offset = divmod(int(batch.positions[n]), tokens_per_block)
            ids = cache.table[layer, int(batch.token_slots[n]), :, span].long()
            cache.blocks[ids, 0, offset] = key[n].to(cache.blocks.dtype)
            cache.blocks[ids, 1, offset] = value[n].to(cache.blocks.dtype)

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
        """See `AttentionKernels.attend`."""
        out = torch.empty_like(query)
        group = query.shape[1] // cache.layout.kv_heads
        for s in range(batch.slots.shape[0]):
            first, last = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
            context = int(batch.context_lengths[s])
            if first == last:
                continue
            keys, values = contiguous_kv(cache, layer, int(batch.slots[s]), context)
            keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
            for n in range(first, last):
                position = context - (last - n)
                low = 0 if window is None else max(0, position - window + 1)
                seen_keys, seen_values = keys[:, low : position + 1], values[:, low : position + 1]
                scores = torch.einsum("hd,hjd->hj", query[n].float(), seen_keys) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[n] = torch.einsum("hj,hjd->hd", scores.softmax(-1), seen_values).to(out.dtype)
        return out


def contiguous_kv(cache: KVCache, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V of a sequence's first `length` tokens: two float32 `[kv_heads, length, head_dim]`."""
    spans = cache.layout.spans(length)
    ids = cache.table[layer, slot, :, :spans].long()
    flat = cache.blocks[ids].transpose(1, 2).flatten(2, 3)  # [kv_heads, 2, spans * T, head_dim]
    return flat[:, 0, :length].float(), flat[:, 1, :length].float()
