"""Prefill attention: queries of several sequences, packed one after another, each over its own history."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.kernels.triton.language import (
    New,
    exponents,
    jit,
    key_rows,
    next_power_of_2,
    precision,
    tanh,
    tl,
)
from muxserve.engine.kernels.triton.tuning import PrefillLaunch, prefill_launch


def prefill_attention(
    cache: KVCache,
    layer: int,
    slots: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    query: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    *,
    launch: PrefillLaunch | None = None,
    new: New = torch.empty,
) -> Tensor:
    """Causal attention of chunks of prompts over what came before them and themselves; formula and meaning as
    `AttentionKernels.attend`.

    query: `[N, heads, head_dim]`, contiguous. slots, context_lengths: int64 `[S]`; query_starts: int64
    `[S + 1]`, prefix sums of the numbers of queries, the last of which may be less than N: queries past it
    are padding and left as they come. A sequence may have no query. The grid depends on N and S alone, so
    that a graph can capture it. Returns the like of `query`.
    """
    count, heads, dim = query.shape
    out = new(query.shape, dtype=query.dtype, device=query.device)
    sequences = slots.shape[0]
    if not count or not sequences:
        return out
    kv_heads, table = cache.layout.kv_heads, cache.table[layer]
    group = heads // kv_heads
    launch = launch or prefill_launch(query.device, dim, group, cache.blocks.element_size())
    queries = launch.rows // group
    # A sequence has at most one tile more than its queries fill.
    _prefill[kv_heads, count // queries + sequences](
        query,
        out,
        cache.blocks,
        table,
        slots,
        query_starts,
        context_lengths,
        *exponents(scale, soft_cap),
        window or 0,
        sequences,
        cache.blocks.stride(0),
        table.stride(0),
        table.stride(1),
        GROUP=group,
        QUERIES=queries,
        ROWS=launch.rows,
        KEYS=launch.keys,
        DIM=dim,
        PADDED=next_power_of_2(dim),
        TOKENS=cache.layout.tokens_per_block,
        WINDOWED=window is not None,
        CAPPED=soft_cap is not None,
        PRECISION=precision(cache.blocks.element_size()),
        AT_ONCE=128,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out


@jit
def _prefill(
    query,
    out,
    blocks,
    table,
    slots,
    query_starts,
    context_lengths,
    scale,
    cap,
    window,
    sequences,
    block_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """QUERIES tokens of one sequence and all query heads of one KV head, as the rows of one tile.

    Row r is query head r % GROUP of token r // GROUP. The last tiles of long sequences have most to do and
    start first.
    """
    kv_head = tl.program_id(0)
    s, tile = _place(query_starts, sequences, tl.num_programs(1) - 1 - tl.program_id(1), QUERIES, AT_ONCE)
    begin, end = tl.load(query_starts + s).to(tl.int32), tl.load(query_starts + s + 1).to(tl.int32)
    count = tl.minimum(end - begin - tile * QUERIES, QUERIES)
    if count <= 0:
        return
    context = tl.load(context_lengths + s).to(tl.int32)
    first = context - (end - begin) + tile * QUERIES  # the position of the first query, and of the last:
    last = first + count - 1

    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    heads = tl.num_programs(0) * GROUP
    token = (begin + tile * QUERIES + r // GROUP).to(tl.int64)
    place = (token * heads + kv_head * GROUP + r % GROUP)[:, None] * DIM + d[None, :]
    inside = (r // GROUP < count)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + place, mask=inside, other=0.0).to(blocks.dtype.element_ty)
    at = tl.minimum(first + r // GROUP, last)  # rows that are not there see what the last one sees
    row = table + tl.load(slots + s) * slot_stride + kv_head * head_stride

    # Keys that every row sees, in whole tiles, lie between those that need a mask.
    whole_end = (first + 1) // KEYS * KEYS
    low = first * 0
    whole = low
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        whole = tl.maximum(last - window + KEYS, 0) // KEYS * KEYS
        whole_end = tl.maximum(whole_end, low)
        whole = tl.minimum(whole, whole_end)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    if WINDOWED:
        best, total, acc = _attend(
            q, at, best, total, acc, blocks, row, block_stride, low, whole, last, scale, cap, window,
            True, WINDOWED, CAPPED, KEYS, DIM, PADDED, TOKENS, PRECISION,
        )  # fmt: skip
    best, total, acc = _attend(
        q, at, best, total, acc, blocks, row, block_stride, whole, whole_end, last, scale, cap, window,
        False, WINDOWED, CAPPED, KEYS, DIM, PADDED, TOKENS, PRECISION,
    )  # fmt: skip
    best, total, acc = _attend(
        q, at, best, total, acc, blocks, row, block_stride, whole_end, last + 1, last, scale, cap, window,
        True, WINDOWED, CAPPED, KEYS, DIM, PADDED, TOKENS, PRECISION,
    )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@jit
def _place(query_starts, sequences, tile, QUERIES: tl.constexpr, AT_ONCE: tl.constexpr):
    """(sequence, tile of its own) of a tile of the grid.

    Sequence s owns the tiles from `query_starts[s] // QUERIES + s` on: that leaves each one enough of them
    without a prefix sum over numbers of tiles, and some that are empty.
    """
    s = tile * 0 - 1
    for some in tl.range(0, sequences, AT_ONCE):
        i = some + tl.arange(0, AT_ONCE)
        starts = tl.load(query_starts + i, mask=i < sequences, other=0).to(tl.int32)
        s += tl.sum(((i < sequences) & (starts // QUERIES + i <= tile)).to(tl.int32), 0)
    return s, tile - (tl.load(query_starts + s).to(tl.int32) // QUERIES + s)


@jit
def _attend(
    q,
    at,
    best,
    total,
    acc,
    blocks,
    table_row,
    block_stride,
    begin,
    end,
    last,
    scale,
    cap,
    window,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running softmax of the rows, gone on with over keys `[begin, end)`, none after `last`. at: int32
    `[ROWS]`, positions.

    best: each row's largest score so far; total: the sum of its weights; acc: of its weighted values.
    """
    d = tl.arange(0, PADDED)
    dtype: tl.constexpr = blocks.dtype.element_ty
    for start in tl.range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        rows, there = key_rows(table_row, keys, keys <= last, block_stride, TOKENS, DIM)
        wanted = there[:, None] & (d < DIM)[None, :]
        place = blocks + rows[:, None] + d[None, :]
        k = tl.load(place, mask=wanted, other=0.0)
        score = (
            tl.dot(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32), input_precision=PRECISION)
            * scale
        )
        if CAPPED:
            score = tanh(score) * cap
        if MASKED:
            seen = keys[None, :] <= at[:, None]
            if WINDOWED:
                seen = seen & (at[:, None] - keys[None, :] < window)
            score = tl.where(seen, score, float("-inf"))
        above = tl.maximum(best, tl.max(score, 1))
        if MASKED and WINDOWED:  # a row may have seen nothing yet
            above = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp2(score - above[:, None])
        fade = tl.exp2(best - above)
        v = tl.load(place + TOKENS * DIM, mask=wanted, other=0.0)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(dtype), v, acc * fade[:, None], input_precision=PRECISION)
        best = above
    return best, total, acc
