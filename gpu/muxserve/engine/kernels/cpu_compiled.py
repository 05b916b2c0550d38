"""The compiled half of `CpuKernels`: attention in place and KV copies over an arena's words, by numba.

bfloat16 reaches numba as its bits: widening to float32 is a shift by 16. The same source serves float32, with
32-bit words and a shift by 0, so there are two signatures per kernel. They are explicit: everything is
compiled, or read from numba's disk cache, when this module is imported, and nothing compiles while requests
are served. The cache lies in `__pycache__`, or where NUMBA_CACHE_DIR says, or in the user's cache directory;
without any of these the kernels compile at every start.

Arguments that all kernels share
    raw: uint16 or uint32 `[words]`, the arena; shift: makes a word float32 bits; stride: words from one block
    to the next; tokens_per_block: T; table: int32, block ids of one layer, -1 = none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

Array = NDArray[Any]

numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

# No "nnan" or "ninf": a model that produces NaN must be seen to produce NaN.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


def _compiled(*signatures: str, parallel: bool = False) -> Callable[[Any], Any]:
    """numba.njit without the GIL, cached on disk if there is a directory that can be written."""

    def decorate(function: Any) -> Any:
        def compile_(cache: bool) -> Any:
            return numba.njit(
                list(signatures),
                cache=cache,
                nogil=True,
                parallel=parallel,
                fastmath=_FASTMATH,
                error_model="numpy",
            )(function)

        try:
            return compile_(cache=True)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return compile_(cache=False)

    return decorate


@_compiled("float32(float32)")
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0 to 3e-7 relative, NaN for NaN; loops over it vectorise. Cephes' expf polynomial."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled(
    "void(uint16[::1], uint32, int64, int64, uint32[::1])",
    "void(uint32[::1], uint32, int64, int64, uint32[::1])",
)
def _widen(raw: Array, shift: Any, start: int, count: int, bits: Array) -> None:
    """`count` words of `raw` from `start` on → float32 bits in `bits`; the rest of `bits` becomes 0.0."""
    source = raw[start : start + count]
    shift = shift & np.uint32(31)  # tells LLVM that 32-bit lanes are enough
    for i in range(count):
        bits[i] = np.uint32(source[i]) << shift
    for i in range(count, bits.size):
        bits[i] = 0


@_compiled("void(float32[::1], int64, float32, float32, float32[::1], float32[::1], float32[::1])")
def _soften(
    scores: Array, count: int, scale: float, soft_cap: float, top: Array, total: Array, acc: Array
) -> None:
    """One step of the online softmax: raw dot products `scores[:count]` become weights.

    `top`, `total` (one element each) and `acc` are the running maximum, sum of weights and weighted sum of
    values; weights are relative to the new maximum, and the two sums are rescaled to it. `soft_cap` 0 = none.
    `scores` after `count` become 0 up to a multiple of four, so that the caller may go on in fours.
    """
    highest = top[0]
    for t in range(count):
        score = scores[t] * scale
        if soft_cap > 0:
            score = soft_cap * np.float32(math.tanh(score / soft_cap))
        scores[t] = score
        highest = max(highest, score)
    fade = np.float32(math.exp(top[0] - highest))
    weights = np.float32(0.0)
    for t in range(count):
        weight = _exp(scores[t] - highest)
        scores[t] = weight
        weights += weight
    for t in range(count, (count + 3) // 4 * 4):
        scores[t] = 0
    top[0] = highest
    total[0] = total[0] * fade + weights
    for d in range(acc.size):
        acc[d] *= fade


@_compiled(
    *(
        f"int64({word}[::1], uint32, int64, int64, int32[:], int64, int64, float32[:, ::1], float32, float32,"
        " float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], uint32[::1])"
        for word in ("uint16", "uint32")
    )
)
def _attend_one(
    raw: Array,
    shift: Any,
    stride: int,
    tokens_per_block: int,
    ids: Array,
    low: int,
    context: int,
    query: Array,
    scale: float,
    soft_cap: float,
    acc: Array,
    scores: Array,
    top: Array,
    total: Array,
    bits: Array,
) -> int:
    """One token, one KV head: its queries `[G, D]` over keys `[low, context)`; the result is `acc`.

    Four keys at a time: each is widened once for the whole group, and a pass over `acc` is paid once in four.
    Rows past the last key are zeros, never what the block holds there. Scratch: `scores` `[G, >= T + 3]`,
    `top` and `total` `[G]`, `bits` `[4 * D]`. Returns 1 if a span has no block.
    """
    group, dim = query.shape
    acc[:] = 0
    top[:] = -np.inf
    total[:] = 0
    rows = bits.view(np.float32)
    row0, row1, row2, row3 = rows[:dim], rows[dim : 2 * dim], rows[2 * dim : 3 * dim], rows[3 * dim :]
    zero = np.float32(0.0)
    for span in range(low // tokens_per_block, (context + tokens_per_block - 1) // tokens_per_block):
        if ids[span] < 0:
            return 1
        first = max(low - span * tokens_per_block, 0)
        count = min(context - span * tokens_per_block, tokens_per_block) - first
        keys = np.int64(ids[span]) * stride + first * dim
        values = keys + tokens_per_block * dim
        for t in range(0, count, 4):
            _widen(raw, shift, keys + t * dim, min(count - t, 4) * dim, bits)
            for g in range(group):
                q = query[g]
                s0, s1, s2, s3 = zero, zero, zero, zero
                for d in range(dim):
                    s0 += q[d] * row0[d]
                    s1 += q[d] * row1[d]
                    s2 += q[d] * row2[d]
                    s3 += q[d] * row3[d]
                scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = s0, s1, s2, s3
        for g in range(group):
            _soften(scores[g], count, scale, soft_cap, top[g : g + 1], total[g : g + 1], acc[g])
        for t in range(0, count, 4):
            _widen(raw, shift, values + t * dim, min(count - t, 4) * dim, bits)
            for g in range(group):
                p0, p1, p2, p3 = scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3]
                sums = acc[g]
                for d in range(dim):
                    sums[d] += p0 * row0[d] + p1 * row1[d] + p2 * row2[d] + p3 * row3[d]
    for g in range(group):
        for d in range(dim):
            acc[g, d] /= total[g]
    return 0


def _attend_signatures(*last: str) -> tuple[str, ...]:
    return tuple(
        f"int64({word}[::1], uint32, int64, int64, int32[:, :, :], int64[::1], int64[::1], int64[::1],"
        f" float32[:, :, ::1], float32, float32, int64, {', '.join(last)}, float32[:, :, ::1])"
        for word in ("uint16", "uint32")
    )


@_compiled(*_attend_signatures("int64", "int64"))
def attend(
    raw: Array,
    shift: Any,
    stride: int,
    tokens_per_block: int,
    table: Array,
    slots: Array,
    positions: Array,
    chosen: Array,
    query: Array,
    scale: float,
    soft_cap: float,
    window: int,
    begin: int,
    end: int,
    out: Array,
) -> int:
    """Query tokens in place, on this thread: tasks `[begin, end)`.

    Task `i * kv_heads + head` is that KV head of token `chosen[i]`. table: `[slots, kv_heads, spans]`. slots,
    positions: int64 `[N]`, of every token; chosen: int64, indices into those.
    query, out: float32 `[N, heads, D]`. Returns how many tasks met a span without a block.
    """
    kv_heads = table.shape[1]
    group = query.shape[1] // kv_heads
    scores = np.empty((group, tokens_per_block + 3), np.float32)
    top = np.empty(group, np.float32)
    total = np.empty(group, np.float32)
    bits = np.empty(4 * query.shape[2], np.uint32)
    missing = 0
    for task in range(begin, end):
        n, head = chosen[task // kv_heads], task % kv_heads
        first, context = head * group, positions[n] + 1
        missing += _attend_one(
            raw,
            shift,
            stride,
            tokens_per_block,
            table[slots[n], head],
            max(context - window, 0),
            context,
            query[n, first : first + group],
            scale,
            soft_cap,
            out[n, first : first + group],
            scores,
            top,
            total,
            bits,
        )
    return missing


@_compiled("int64[::1](int64[::1], int64[::1], int64, int64, int64)")
def _bounds(positions: Array, chosen: Array, window: int, kv_heads: int, parts: int) -> Any:
    """Tasks of about equal cost for each part: part p is tasks `[bounds[p], bounds[p + 1])`."""
    count = chosen.size
    done = np.zeros(count + 1, np.int64)  # keys that are read for tokens before the i-th
    for i in range(count):
        done[i + 1] = done[i] + min(positions[chosen[i]] + 1, window) * kv_heads
    bounds = np.full(parts + 1, count * kv_heads, np.int64)
    bounds[0] = 0
    i = 0
    for part in range(1, parts):
        goal = done[count] * part // parts
        while i < count and done[i + 1] <= goal:
            i += 1
        if i < count:
            each = (done[i + 1] - done[i]) // kv_heads
            bounds[part] = i * kv_heads + (goal - done[i] + each // 2) // each
    return bounds


@_compiled(*_attend_signatures("int64"), parallel=True)
def attend_parallel(
    raw: Array,
    shift: Any,
    stride: int,
    tokens_per_block: int,
    table: Array,
    slots: Array,
    positions: Array,
    chosen: Array,
    query: Array,
    scale: float,
    soft_cap: float,
    window: int,
    parts: int,
    out: Array,
) -> int:
    """`attend` for all tasks, in `parts`, on numba's threads.

    A function of its own, not one source compiled twice: numba's disk cache knows a function by source and
    signature, and would take the serial one for the parallel one.
    """
    bounds = _bounds(positions, chosen, window, table.shape[1], parts)
    missing = np.zeros(parts, np.int64)
    for part in prange(parts):
        missing[part] = attend(
            raw,
            shift,
            stride,
            tokens_per_block,
            table,
            slots,
            positions,
            chosen,
            query,
            scale,
            soft_cap,
            window,
            bounds[part],
            bounds[part + 1],
            out,
        )
    return int(missing.sum())


@_compiled(
    *(
        f"int64({word}[::1], int64, int64, int32[:, :, :], int64[::1], int64[::1], {word}[:, :, ::1],"
        f" {word}[:, :, ::1])"
        for word in ("uint16", "uint32")
    )
)
def write(
    raw: Array,
    stride: int,
    tokens_per_block: int,
    table: Array,
    slots: Array,
    positions: Array,
    key: Array,
    value: Array,
) -> int:
    """Store `[N, kv_heads, D]` words at the slots and positions. Returns how many had no block."""
    count, kv_heads, dim = key.shape
    missing = 0
    for n in range(count):
        span, offset = positions[n] // tokens_per_block, positions[n] % tokens_per_block
        for head in range(kv_heads):
            block = table[slots[n], head, span]
            if block < 0:
                missing += 1
                continue
            start = np.int64(block) * stride + offset * dim
            raw[start : start + dim] = key[n, head]
            start += tokens_per_block * dim
            raw[start : start + dim] = value[n, head]
    return missing


@_compiled(
    *(
        f"int64({word}[::1], uint32, int64, int64, int32[:, :], int64, uint32[:, :, ::1], uint32[:, :, ::1])"
        for word in ("uint16", "uint32")
    )
)
def gather(
    raw: Array,
    shift: Any,
    stride: int,
    tokens_per_block: int,
    table: Array,
    low: int,
    keys: Array,
    values: Array,
) -> int:
    """A sequence's positions `[low, low + n)` as float32 bits, `keys` and `values` `[kv_heads, n, D]`.

    table: int32 `[kv_heads, spans]`. Returns 1 if a span has no block."""
    kv_heads, count, dim = keys.shape
    for head in range(kv_heads):
        position = low
        while position < low + count:
            span, offset = position // tokens_per_block, position % tokens_per_block
            rows = min(tokens_per_block - offset, low + count - position)
            if table[head, span] < 0:
                return 1
            start = np.int64(table[head, span]) * stride + offset * dim
            into, words = position - low, rows * dim
            _widen(raw, shift, start, words, keys[head, into : into + rows].reshape(words))
            start += tokens_per_block * dim
            _widen(raw, shift, start, words, values[head, into : into + rows].reshape(words))
            position += rows
    return 0
