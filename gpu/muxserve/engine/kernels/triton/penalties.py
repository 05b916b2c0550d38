"""Repetition, frequency and presence penalties, over the token table where it lies. See `engine.sampler`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.triton.language import New, jit, tl
from muxserve.engine.kernels.triton.tuning import SAMPLE
from muxserve.engine.sampler import SamplingBatch


def penalise(
    logits: Tensor, batch: SamplingBatch, positions: Tensor, tokens: Tensor, *, new: New = torch.empty
) -> Tensor:
    """`logits`, float32 `[R, V]`, with every row's penalties applied: a new tensor of the same bits as
    `engine.sampler` makes.

    positions: int64 `[R]`, known tokens of a row; tokens: int32 `[slots, context]`, the token table. Takes
    int32 `[R, V]` for the counts beside the result.
    """
    rows, vocabulary = logits.shape
    scores = new(logits.shape, dtype=logits.dtype, device=logits.device)
    counts = new((rows, vocabulary), dtype=torch.int32, device=logits.device).zero_()
    block, warps = SAMPLE.block, SAMPLE.warps
    _count[rows, -(-tokens.shape[1] // block)](
        counts,
        tokens,
        batch.slots,
        positions,
        batch.prompt_lengths,
        tokens.stride(0),
        vocabulary,
        BLOCK=block,
        num_warps=warps,
    )
    _penalise[rows, -(-vocabulary // block)](
        logits,
        scores,
        counts,
        batch.repetition,
        batch.frequency,
        batch.presence,
        logits.stride(0),
        vocabulary,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,  # a product and a difference, each rounded, as the reference has them
    )
    return scores


@jit
def _count(counts, tokens, slots, positions, prompt_lengths, token_stride, vocabulary, BLOCK: tl.constexpr):
    """BLOCK of a row's tokens: the prompt's leave a mark, 2^30, and each of the output adds one."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = tl.load(positions + row)
    if tl.program_id(1) * BLOCK >= known:
        return
    token = tl.load(tokens + tl.load(slots + row) * token_stride + place, mask=place < known, other=0)
    is_output = place >= tl.load(prompt_lengths + row)
    target = counts + row * vocabulary + token
    tl.atomic_add(target, 1, mask=(place < known) & is_output, sem="relaxed")
    tl.atomic_or(target, 1 << 30, mask=(place < known) & (is_output == 0), sem="relaxed")


@jit
def _penalise(
    logits, scores, counts, repetition, frequency, presence, logits_stride, vocabulary, BLOCK: tl.constexpr
):
    """BLOCK scores of one row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    score = tl.load(logits + row * logits_stride + token, mask=inside, other=0.0)
    seen = tl.load(counts + row * vocabulary + token, mask=inside, other=0)
    factor = tl.load(repetition + row)
    repeated = tl.where(score > 0, tl.math.div_rn(score, tl.zeros_like(score) + factor), score * factor)
    score = tl.where(seen != 0, repeated, score)
    count = (seen & ((1 << 30) - 1)).to(tl.float32)
    score -= tl.load(frequency + row) * count
    score -= tl.load(presence + row) * (count > 0).to(tl.float32)
    tl.store(scores + row * vocabulary + token, score, mask=inside)
