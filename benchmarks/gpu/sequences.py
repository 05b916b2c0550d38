"""Sequences with random KV in the blocks of a cache, and what attention over them should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.spec import KVLayout


@dataclass(frozen=True, slots=True)
class Filled:
    """A cache of one layer whose slot s holds `contexts[s]` tokens, all else NaN; keys and values of slot s
    are `[kv_heads, contexts[s], head_dim]`."""

    cache: KVCache
    contexts: list[int]
    keys: list[Tensor]
    values: list[Tensor]


def filled(layout: KVLayout, contexts: list[int], generator: torch.Generator) -> Filled:
    """Blocks lie in random order, and a few are free."""
    device, dtype = generator.device, getattr(torch, layout.dtype)
    spans = max(map(layout.spans, contexts))
    blocks = sum(map(layout.spans, contexts)) * layout.kv_heads + 3
    arena = torch.full((blocks * layout.block_bytes,), 0xFF, dtype=torch.uint8, device=device)
    order = torch.randperm(blocks, generator=generator, device=device).int()
    table = torch.full((1, len(contexts), layout.kv_heads, spans), -1, dtype=torch.int32, device=device)
    cache = KVCache.over(arena, table, layout)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    taken = 0
    for slot, context in enumerate(contexts):
        shape = (layout.kv_heads, context, layout.head_dim)
        held = layout.spans(context)
        ids = order[taken : taken + layout.kv_heads * held].view(layout.kv_heads, held)
        taken += ids.numel()
        table[0, slot, :, :held] = ids
        for part, kept in enumerate((keys, values)):
            kept.append(torch.randn(shape, generator=generator, device=device).to(dtype))
            padded = torch.full((shape[0], held * layout.tokens_per_block, shape[2]), torch.nan, dtype=dtype)
            padded = padded.to(device)
            padded[:, :context] = kept[-1]
            cache.blocks[ids.long(), part] = padded.view(shape[0], held, layout.tokens_per_block, shape[2])
    return Filled(cache, contexts, keys, values)


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """In float64: the last `len(query)` tokens, `[N, heads, head_dim]`, over keys and values
    `[kv_heads, context, head_dim]`. Formula of `Kernels.attend`."""
    count, context = len(query), keys.shape[1]
    group = query.shape[1] // len(keys)
    k, v = (each.double().repeat_interleave(group, 0) for each in (keys, values))
    scores = torch.einsum("nhd,hjd->hnj", query.double(), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    at = torch.arange(context - count, context, device=query.device)[:, None]
    back = at - torch.arange(context, device=query.device)[None, :]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    return torch.einsum("hnj,hjd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
