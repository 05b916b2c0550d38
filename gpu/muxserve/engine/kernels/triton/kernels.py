"""`TritonKernels`: attention over blocks on a GPU, for whatever runs on `AttentionKernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.write import write_qkv


class TritonKernels:
    """Implements `AttentionKernels`. Never waits for the device."""

    def write(self, cache: KVCache, layer: int, batch: RaggedBatch, key: Tensor, value: Tensor) -> None:
        """See `AttentionKernels.write`. Where Q, K and V are one tensor, `write_qkv` does this, norms and
        rotation in one pass."""
        kv = torch.cat([key, value], dim=1)
        write_qkv(cache, layer, batch.token_slots, batch.positions, kv, 0, None)

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
        query = query.contiguous()
        how = (query, scale, window, soft_cap)
        if batch.max_query == 1 and len(query) == len(batch.slots):
            return decode_attention(
                cache, layer, batch.slots, batch.context_lengths, *how, longest=batch.max_context
            )
        return prefill_attention(cache, layer, batch.slots, batch.query_starts, batch.context_lengths, *how)
