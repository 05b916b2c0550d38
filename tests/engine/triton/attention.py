"""TritonKernels as an attention that the tests of all other kernels can call."""

from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.triton.kernels import TritonKernels
from muxserve.engine.kernels.triton.scratch import Scratch

Piece = tuple[int, int, int]


def moved(cache: KVCache, device: torch.device) -> KVCache:
    """A copy of the cache on `device`, every byte of its arena included."""
    words = cache.blocks.as_strided(
        (cache.blocks.untyped_storage().nbytes() // cache.blocks.itemsize,), (1,), 0
    )
    arena = words.clone().to(device).view(torch.uint8)
    return KVCache.over(arena, cache.table.to(device), cache.layout)


def ragged(pieces: list[Piece], device: torch.device) -> RaggedBatch:
    """Tokens `[begin, end)` of each (slot, begin, end)."""
    counts = torch.tensor([end - begin for _, begin, end in pieces])
    slots = torch.tensor([slot for slot, _, _ in pieces])
    ends = [end for _, _, end in pieces]
    return RaggedBatch(
        slots=slots.to(device),
        query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device),
        context_lengths=torch.tensor(ends).to(device),
        positions=torch.cat([torch.arange(begin, end) for _, begin, end in pieces]).to(device),
        token_slots=slots.repeat_interleave(counts).to(device),
        max_query=int(counts.max()),
        max_context=max(ends),
    )


class TritonAttention:
    """Writes K and V of a call's tokens, then attends, on a copy of `cache` on the device."""

    def __init__(
        self, cache: KVCache, device: torch.device, heads: int, window: int | None, soft_cap: float | None
    ) -> None:
        self.cache = moved(cache, device)
        self._device, self._heads = device, heads
        self._how = (cache.layout.head_dim**-0.5, window, soft_cap)

    def __call__(self, layer: int, pieces: list[Piece], qkv: Tensor) -> Tensor:
        kv_heads = self.cache.layout.kv_heads
        assert qkv.shape[1] == self._heads + 2 * kv_heads
        batch, kernels = ragged(pieces, self._device), TritonKernels(Scratch(self._device))
        query = kernels.write(self.cache, layer, batch, qkv.to(self._device), self._heads, None, None)
        return kernels.attend(self.cache, layer, batch, query, *self._how).cpu()
