"""`ReferenceKernels`: every operation in plain torch, the yardstick of every other implementation.

One token, one head at a time where that is clearest; nothing here is meant to be fast. Any device, any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from muxserve.engine.kernels.interface import Angles, KVCache, Norm, QKNorm, RaggedBatch


class ReferenceKernels:
    """Implements `Kernels`. Attention copies a sequence's KV out of its blocks and spells the formula out."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def frame(self) -> AbstractContextManager[object]:
        """See `Kernels.frame`."""
        return nullcontext()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Kernels.empty`."""
        return torch.empty(*shape, dtype=dtype, device=self._device)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See `Kernels.embed`."""
        return F.embedding(tokens, table)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """See `Kernels.linear`."""
        result = F.linear(x, weight, bias)
        return result if out is None else out.copy_(result)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Kernels.norm`."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (y * norm.weight).to(x.dtype) if norm.late else y.to(x.dtype) * norm.weight.to(x.dtype)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm, before: Norm | None) -> Tensor:
        """See `Kernels.add_norm`."""
        residual += x if before is None else self.norm(x, before)
        return self.norm(residual, norm)

    def angles(
        self, positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
    ) -> Angles:
        """See `Kernels.angles`."""
        angle = positions.float()[:, None] * frequencies
        cos, sin = angle.cos() * attention_factor, angle.sin() * attention_factor
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    def write(
        self,
        cache: KVCache,
        layer: int,
        batch: RaggedBatch,
        qkv: Tensor,
        heads: int,
        angles: Angles | None,
        norm: QKNorm | None,
    ) -> Tensor:
        """See `Kernels.write`."""
        both = heads + cache.layout.kv_heads
        qk, value = qkv[:, :both], qkv[:, both:]
        if norm is not None:
            rows = torch.cat([norm.query.expand(heads, -1), norm.key.expand(both - heads, -1)])
            qk = self.norm(qk, Norm(rows, norm.eps, norm.late))
        if angles is not None:
            qk = rotate(qk, *angles)
        self.store(cache, layer, batch, qk[:, heads:], value)
        return qk[:, :heads]

    def store(self, cache: KVCache, layer: int, batch: RaggedBatch, key: Tensor, value: Tensor) -> None:
        """Keys, ready, and values, both `[N, kv_heads, head_dim]`, at the batch's positions."""
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
        """See `Kernels.attend`."""
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

    def gate(self, gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
        """See `Kernels.gate`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading `2 * cos.shape[-1]` dimensions of `heads` `[N, heads, head_dim]`; a new tensor."""
    half = cos.shape[-1]
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    # Products round to the model's dtype before the sum does, as in transformers.
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if 2 * half < heads.shape[-1]:
        out[..., 2 * half :] = heads[..., 2 * half :]
    return out


def contiguous_kv(cache: KVCache, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V of a sequence's first `length` tokens: two float32 `[kv_heads, length, head_dim]`."""
    spans = cache.layout.spans(length)
    ids = cache.table[layer, slot, :, :spans].long()
    flat = cache.blocks[ids].transpose(1, 2).flatten(2, 3)  # [kv_heads, 2, spans * T, head_dim]
    return flat[:, 0, :length].float(), flat[:, 1, :length].float()
