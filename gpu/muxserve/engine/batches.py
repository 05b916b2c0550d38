"""From the rows of a job to the tensors that the decoder takes. Built once a job; a decode step adds one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import RaggedBatch
from muxserve.engine.messages import PrefillChunk


def prefill_batch(chunks: Sequence[PrefillChunk]) -> RaggedBatch:
    """The chunks one after another along the token axis. Chunks are not empty."""
    slots, starts, ends = torch.tensor([(c.slot, c.start, c.end) for c in chunks]).unbind(1)
    lengths = ends - starts
    query_starts = torch.zeros(len(chunks) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=query_starts[1:])
    within = torch.arange(int(query_starts[-1])) - query_starts[:-1].repeat_interleave(lengths)
    return RaggedBatch(
        slots=slots.contiguous(),
        query_starts=query_starts,
        context_lengths=ends.contiguous(),
        positions=within + starts.repeat_interleave(lengths),
        token_slots=slots.repeat_interleave(lengths),
        max_query=int(lengths.max()),
        max_context=int(ends.max()),
    )


def decode_batch(slots: Tensor, lengths: Tensor) -> RaggedBatch:
    """One query each: the last of `lengths` known tokens. slots, lengths: int64 `[S]`."""
    return RaggedBatch(
        slots=slots,
        query_starts=torch.arange(len(slots) + 1),
        context_lengths=lengths,
        positions=lengths - 1,
        token_slots=slots,
        max_query=1,
        max_context=int(lengths.max()),
    )
