"""`TritonKernels`: everything that a decoder is made of, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Angles, KVCache, Norm, QKNorm, RaggedBatch
from muxserve.engine.kernels.triton.angles import angles
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.gates import gate_mul
from muxserve.engine.kernels.triton.norms import add_rms_norm, rms_norm
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.scratch import Scratch
from muxserve.engine.kernels.triton.write import write_qkv


class TritonKernels:
    """Implements `Kernels`. Never waits for the device, and takes all memory from `scratch`: so it is for one
    stream of work, whose results are gone when the scratch is reset."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._new = scratch.new

    def frame(self) -> AbstractContextManager[object]:
        """See `Kernels.frame`."""
        return self._scratch.frame()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Kernels.empty`."""
        return self._scratch.new(tuple(shape), dtype=dtype)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """See `Kernels.embed`."""
        out = self.empty((len(tokens), table.shape[1]), table.dtype)
        return torch.index_select(table, 0, tokens, out=out)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """See `Kernels.linear`."""
        if out is None:
            out = self.empty((len(x), len(weight)), x.dtype)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """See `Kernels.norm`."""
        return rms_norm(x, norm, new=self._new)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm, before: Norm | None) -> Tensor:
        """See `Kernels.add_norm`."""
        return add_rms_norm(x, residual, norm, before, new=self._new)

    def angles(
        self, positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
    ) -> Angles:
        """See `Kernels.angles`."""
        return angles(positions, frequencies, attention_factor, dtype, new=self._new)

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
        where = (batch.token_slots, batch.positions)
        return write_qkv(cache, layer, *where, qkv, heads, angles, norm, new=self._new)

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
        """See `Kernels.attend`. `query` is contiguous."""
        how = (query, scale, window, soft_cap)
        if batch.max_query == 1 and len(query) == len(batch.slots):
            slots, lengths, longest = batch.slots, batch.context_lengths, batch.max_context
            return decode_attention(cache, layer, slots, lengths, *how, longest=longest, new=self._new)
        starts, contexts = batch.query_starts, batch.context_lengths
        return prefill_attention(cache, layer, batch.slots, starts, contexts, *how, new=self._new)

    def gate(self, gate_up: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
        """See `Kernels.gate`."""
        return gate_mul(gate_up, activation, new=self._new)
