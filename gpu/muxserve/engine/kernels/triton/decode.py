"""Decode attention: one query per sequence, a long context cut into splits that run side by side."""

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
from muxserve.engine.kernels.triton.tuning import DecodeLaunch, decode_launch, splits


def decode_attention(
    cache: KVCache,
    layer: int,
    slots: Tensor,
    lengths: Tensor,
    query: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    *,
    longest: int,
    launch: DecodeLaunch | None = None,
    new: New = torch.empty,
) -> Tensor:
    """Attention of each sequence's last token over its KV; formula and meaning as `AttentionKernels.attend`.

    query: `[S, heads, head_dim]`, contiguous. slots: int64 `[S]`; lengths: int64 `[S]`, keys of a sequence,
    the query's own included; a row of length 0 is padding: it touches no block and becomes zeros. longest: no
    length is above it, now or when a graph that captured this is replayed. With S, which must not change
    either, it fixes the grid; how a context is cut within that is up to its length, on the device. Returns
    the like of `query`.
    """
    count, heads, dim = query.shape
    out = new(query.shape, dtype=query.dtype, device=query.device)
    if not count:
        return out
    kv_heads, table = cache.layout.kv_heads, cache.table[layer]
    group = heads // kv_heads
    launch = launch or decode_launch(query.device, dim, group, cache.blocks.element_size())
    parts = splits(query.device, launch, count * kv_heads, longest)
    partial, sums = out, out
    if parts > 1:
        partial = new((count, heads, parts, dim), dtype=torch.float32, device=query.device)
        sums = new((count, heads, parts), dtype=torch.float32, device=query.device)
    cut = {
        "SPLITS": parts,
        "KEYS": launch.keys,
        "LEAST": max(1, launch.least_keys // launch.keys),
        "WINDOWED": window is not None,
        "DIM": dim,
        "PADDED": next_power_of_2(dim),
    }
    _decode[parts, kv_heads, count](
        query,
        partial,
        sums,
        cache.blocks,
        table,
        slots,
        lengths,
        *exponents(scale, soft_cap),
        window or 0,
        cache.blocks.stride(0),
        table.stride(0),
        table.stride(1),
        GROUP=group,
        ROWS=max(16, next_power_of_2(group)),
        TOKENS=cache.layout.tokens_per_block,
        CAPPED=soft_cap is not None,
        PRECISION=precision(cache.blocks.element_size()),
        **cut,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if parts > 1:
        _merge[heads, count](
            partial, sums, lengths, out, window or 0, **cut, ALL=next_power_of_2(parts), num_warps=4
        )
    return out


@jit
def _cut(
    length, window, SPLITS: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, WINDOWED: tl.constexpr
):
    """(first key that is seen, first tile, tiles of a split, splits that have any)."""
    low = length * 0
    if WINDOWED:
        low = tl.maximum(length - window, 0)
    first = low // KEYS
    tiles = (length + KEYS - 1) // KEYS - first
    each = tl.maximum((tiles + SPLITS - 1) // SPLITS, LEAST)
    return low, first, each, (tiles + each - 1) // each


@jit
def _decode(
    query,
    partial,
    sums,
    blocks,
    table,
    slots,
    lengths,
    scale,
    cap,
    window,
    block_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One split of one sequence and KV head: its K and V are read once, for all query heads of the group.

    With one split, `partial` is the result; else `[S, heads, SPLITS, DIM]` float32, each split's own softmax,
    and `sums` `[S, heads, SPLITS]` the binary logarithm of what it was divided by.
    """
    split, kv_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + s).to(tl.int32)
    low, first, each, used = _cut(length, window, SPLITS, KEYS, LEAST, WINDOWED)
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    heads = tl.num_programs(1) * GROUP
    head = kv_head * GROUP + r
    inside = (r < GROUP)[:, None] & (d < DIM)[None, :]
    if split >= used:
        if SPLITS == 1:
            zeros = tl.zeros([ROWS, PADDED], dtype=partial.dtype.element_ty)
            tl.store(partial + (s * heads + head[:, None]) * DIM + d[None, :], zeros, mask=inside)
        return
    begin = (first + split * each) * KEYS
    end = tl.minimum(begin + each * KEYS, length)

    dtype: tl.constexpr = blocks.dtype.element_ty
    q = tl.load(query + (s * heads + head[:, None]) * DIM + d[None, :], mask=inside, other=0.0).to(dtype)
    table_row = table + tl.load(slots + s) * slot_stride + kv_head * head_stride
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for start in tl.range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        seen = (keys >= low) & (keys < end)
        rows, there = key_rows(table_row, keys, seen, block_stride, TOKENS, DIM)
        wanted = there[:, None] & (d < DIM)[None, :]
        place = blocks + rows[:, None] + d[None, :]
        k = tl.load(place, mask=wanted, other=0.0)
        v = tl.load(place + TOKENS * DIM, mask=wanted, other=0.0)
        score = tl.dot(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), input_precision=PRECISION) * scale
        if CAPPED:
            score = tanh(score) * cap
        score = tl.where(seen[None, :], score, float("-inf"))
        above = tl.maximum(best, tl.max(score, 1))  # finite: each tile has a key that is seen
        weight = tl.exp2(score - above[:, None])
        fade = tl.exp2(best - above)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(dtype), v, acc * fade[:, None], input_precision=PRECISION)
        best = above

    row = (s * heads + head) * SPLITS + split
    result = (acc / total[:, None]).to(partial.dtype.element_ty)
    tl.store(partial + row[:, None] * DIM + d[None, :], result, mask=inside)
    if SPLITS > 1:
        tl.store(sums + row, best + tl.log2(total), mask=r < GROUP)


@jit
def _merge(
    partial,
    sums,
    lengths,
    out,
    window,
    ALL: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The splits of one head, weighted by their sums. Those that had nothing to do have written nothing."""
    head, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + s).to(tl.int32)
    _, _, _, used = _cut(length, window, SPLITS, KEYS, LEAST, WINDOWED)
    i, d = tl.arange(0, ALL), tl.arange(0, PADDED)
    row = (s * tl.num_programs(0) + head) * SPLITS + i
    share = tl.load(sums + row, mask=i < used, other=float("-inf"))
    weight = tl.exp2(share - tl.maximum(tl.max(share, 0), -3.0e38))
    wanted = (i < used)[:, None] & (d < DIM)[None, :]
    parts = tl.load(partial + row[:, None] * DIM + d[None, :], mask=wanted, other=0.0)
    total = tl.maximum(tl.sum(weight, 0), 1.0e-30)  # 0 where the length is
    result = (tl.sum(parts * weight[:, None], 0) / total).to(out.dtype.element_ty)
    tl.store(out + (s * tl.num_programs(0) + head) * DIM + d, result, mask=d < DIM)
