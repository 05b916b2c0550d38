"""`Kernels`: the operations that a decoder is made of, and the batch and cache that they work on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

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


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm (arXiv 1910.07467) over the last axis, computed in float32.

    Families differ in where they round: Llama and its kin round the normalised input to the model's dtype,
    then scale; Gemma scales in float32 and rounds once (`late`). In float32 there is no difference.

    weight: float32 `[size]`.
    """

    weight: Tensor
    eps: float
    late: bool


@dataclass(frozen=True, slots=True)
class QKNorm:
    """A `Norm` of each query head and each key head. query, key: float32 `[head_dim]`."""

    query: Tensor
    key: Tensor
    eps: float
    late: bool


Angles = tuple[Tensor, Tensor]
"""cos and sin of N tokens, each `[N, 1, rotary_dim / 2]` of the model's dtype."""


class Kernels(Protocol):
    """What a decoder is made of. Free or unwritten blocks may hold any bytes, NaN included.

    Results are new tensors in memory that is the kernels' to give. What comes within `frame()` is not to be
    used after it.
    """

    def frame(self) -> AbstractContextManager[object]:
        """Results made inside may be given up at its end."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory, for what is to live longer than the frame in which it is computed."""

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows `tokens`, int64 `[N]`, of `table` `[vocab, hidden]`."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """`x` `[N, in]` times the rows of `weight` `[out, in]`, plus `bias` `[out]`."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Of `x` `[N, size]`."""

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm, before: Norm | None) -> Tensor:
        """Add `x` `[N, size]` to `residual`, in place, and return the norm of that. before: a norm that `x`
        goes through before it is added."""

    def angles(
        self, positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
    ) -> Angles:
        """For positions int64 `[N]` and frequencies float32 `[rotary_dim / 2]`."""

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
        """Normalise queries and keys, rotate them (half-split form, RoFormer, arXiv 2104.09864), and store
        keys and values in their blocks.

        qkv: `[N, heads + 2 * kv_heads, head_dim]`. Returns the queries, `[N, heads, head_dim]`.
        """

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

    def gate(self, gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
        """`activation(gate) * up` of `[N, 2 * size]`, gate first."""
