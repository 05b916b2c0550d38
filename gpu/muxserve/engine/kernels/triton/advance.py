"""From one decode step to the next without a word to the host: sampled tokens become the next inputs."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from torch import Tensor

from muxserve.engine.kernels.triton.language import jit, next_power_of_2, tl
from muxserve.engine.kernels.triton.sample import DeviceSampled
from muxserve.engine.messages import UNFINISHED

ABSENT = -1
"""In `outcome`: the row was not in the step."""
FINISHED_SHIFT, BAD_SHIFT = 32, 40
"""Where `outcome` has, above the token, what `DeviceSampled` says of it."""


def advance(
    sampled: DeviceSampled,
    outcome: Tensor,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    history: Tensor | None = None,
) -> None:
    """Write `outcome`, int64 `[R]`, for the host, and move the rows on.

    lengths: int64 `[R]`, known tokens; becomes one more, or 0 for a row that has finished or failed; rows of
    length 0 are not in the step. positions: int64 `[R]`, of the last known token, -1 for none; tokens: int64
    `[R]`, that token. history: int32 `[R, context]`, all known tokens, if they are kept. Without `lengths`
    all rows are in the step, and none moves on.
    """
    rows = len(outcome)
    block = next_power_of_2(rows)
    moving = (lengths, positions, tokens)
    _advance[1,](
        sampled.tokens,
        sampled.finished,
        sampled.bad,
        outcome,
        *(outcome if column is None else column for column in moving),
        outcome if history is None else history,
        0 if history is None else history.stride(0),
        0 if history is None else history.shape[1],
        rows,
        MOVES=lengths is not None,
        KEEPS=history is not None,
        UNFINISHED=UNFINISHED,
        ABSENT=ABSENT,
        FINISHED=FINISHED_SHIFT,
        BAD=BAD_SHIFT,
        BLOCK=block,
        num_warps=max(1, min(8, block // 64)),
    )


@jit
def _advance(
    sampled,
    finished,
    bads,
    outcome,
    lengths,
    positions,
    tokens,
    history,
    history_stride,
    context,
    rows,
    MOVES: tl.constexpr,
    KEEPS: tl.constexpr,
    UNFINISHED: tl.constexpr,
    ABSENT: tl.constexpr,
    FINISHED: tl.constexpr,
    BAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rows at once."""
    r = tl.arange(0, BLOCK)
    inside = r < rows
    token = tl.load(sampled + r, mask=inside, other=0)
    end = tl.load(finished + r, mask=inside, other=0).to(tl.int64)
    bad = tl.load(bads + r, mask=inside, other=0).to(tl.int64)
    told = token | (end << FINISHED) | (bad << BAD)
    if MOVES:
        length = tl.load(lengths + r, mask=inside, other=0)
        there = length > 0
        told = tl.where(there, told, ABSENT)
        goes_on = there & (end == UNFINISHED) & (bad == 0)
        if KEEPS:
            place = history + r.to(tl.int64) * history_stride + length
            tl.store(place, token.to(tl.int32), mask=inside & goes_on & (length < context))
        tl.store(lengths + r, tl.where(goes_on, length + 1, 0), mask=inside)
        tl.store(positions + r, tl.where(goes_on, length, -1), mask=inside)
        tl.store(tokens + r, token, mask=inside & goes_on)
    tl.store(outcome + r, told, mask=inside)
