"""`CpuKernels`: attention over blocks on CPU, compiled by numba, with torch for long prompts.

In place: every query token reads K and V where they lie, block by block, with an online softmax; the query
heads of a group share one read. Decode, and prompts so short that nothing else pays. Gathered: the visible KV
of one sequence is copied to contiguous float32 (linear in its context) and multiplied with chunks of its
queries, so that memory does not grow with the square of the prompt. Which of the two is a matter of the
sequence alone, so its result does not depend on the batch.

Threads: the compiled half uses `torch.get_num_threads()` threads of numba's own pool. numba's "workqueue"
layer waits without spinning, so its threads and torch's do not steal each other's cores; it allows one
parallel region at a time in a process, which a lock here guarantees. With one thread no pool is touched.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.kernels import cpu_compiled
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.spec import KVLayout

_SCORE_ELEMENTS = 1 << 19
"""Scores that prefill holds at once, in float32 elements: they should stay in a core's cache."""

_IN_PLACE_WORK = 1 << 14
"""Queries x context x heads up to which reading in place costs less than a copy and a few torch calls."""

_SERIAL_WORK = 1 << 13
"""Queries x context x heads up to which waking another thread costs more than it brings."""

_NO_WINDOW = 1 << 62

_POOL_THREADS = numba.get_num_threads()
"""Threads in numba's pool, fixed for the life of the process: the cores that it may run on."""

_WORDS = {"bfloat16": (torch.uint16, 16), "float32": (torch.uint32, 0)}
"""dtype → the integers its bits are read as, and the shift that makes them float32 bits."""


class UnallocatedBlockError(LookupError):
    """A job reached a position whose span has no block: the tables and the job disagree."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer}: a sequence of the batch reaches into a span without a block")


class CpuKernels:
    """Implements `AttentionKernels` for caches in float32 and bfloat16; ValueError for another dtype.

    Queries, keys and values may be of any float dtype and any strides. Results are accumulated in float32 and
    rounded once to the dtype of `query`. Raises UnallocatedBlockError where the table has no block.
    """

    _one_parallel_region = threading.Lock()

    def __init__(self, in_place_work: int = _IN_PLACE_WORK) -> None:
        """in_place_work: queries x context x heads up to which a prompt is attended in place."""
        self._in_place_work = in_place_work

    def write(self, cache: KVCache, layer: int, batch: RaggedBatch, key: Tensor, value: Tensor) -> None:
        """See `AttentionKernels.write`."""
        words, _ = _word(cache.layout)
        missing = cpu_compiled.write(
            _raw(cache),
            cache.blocks.stride(0),
            cache.layout.tokens_per_block,
            cache.table[layer].numpy(),
            batch.token_slots.numpy(),
            batch.positions.numpy(),
            key.to(cache.blocks.dtype).contiguous().view(words).numpy(),
            value.to(cache.blocks.dtype).contiguous().view(words).numpy(),
        )
        if missing:
            raise UnallocatedBlockError(layer)

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
        """See `AttentionKernels.attend`."""
        queries = query.float().contiguous()
        out = torch.empty_like(queries)
        chosen, large = _split(batch, self._in_place_work // query.shape[1])
        self._in_place(cache, layer, batch, chosen, queries, scale, window, soft_cap, out)
        for s in large:
            first, last = batch.query_starts[s : s + 2].tolist()
            slot, context = int(batch.slots[s]), int(batch.context_lengths[s])
            low = 0 if window is None else max(0, context - (last - first) - window + 1)
            keys, values = _gathered(cache, layer, slot, low, context)
            _attend_gathered(queries[first:last], keys, values, scale, window, soft_cap, out[first:last])
        return out.to(query.dtype)

    def _in_place(
        self,
        cache: KVCache,
        layer: int,
        batch: RaggedBatch,
        chosen: NDArray[np.int64],
        query: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        out: Tensor,
    ) -> None:
        """Fill `out` for the query tokens `chosen` (indices)."""
        positions = batch.positions.numpy()
        arguments = (
            _raw(cache),
            np.uint32(_word(cache.layout)[1]),
            cache.blocks.stride(0),
            cache.layout.tokens_per_block,
            cache.table[layer].numpy(),
            batch.token_slots.numpy(),
            positions,
            chosen,
            query.numpy(),
            np.float32(scale),
            np.float32(soft_cap or 0.0),
            _NO_WINDOW if window is None else window,
        )
        work = int((positions[chosen] + 1).sum()) * query.shape[1]
        threads = min(torch.get_num_threads(), _POOL_THREADS) if work > _SERIAL_WORK else 1
        if threads == 1:
            missing = cpu_compiled.attend(*arguments, 0, chosen.size * cache.layout.kv_heads, out.numpy())
        else:
            with self._one_parallel_region:
                numba.set_num_threads(threads)
                missing = cpu_compiled.attend_parallel(*arguments, threads, out.numpy())
        if missing:
            raise UnallocatedBlockError(layer)


def _split(batch: RaggedBatch, in_place: int) -> tuple[NDArray[np.int64], list[int]]:
    """Query tokens to attend in place, and the sequences to gather: those of more than `in_place` scores."""
    if batch.max_query <= 1:
        return np.arange(batch.positions.shape[0]), []
    counts = np.diff(batch.query_starts.numpy())
    large = (counts > 1) & (counts * batch.context_lengths.numpy() > in_place)
    return np.flatnonzero(~large.repeat(counts)), np.flatnonzero(large).tolist()


def _word(layout: KVLayout) -> tuple[torch.dtype, int]:
    """Integer dtype of the layout's words, and the shift that makes them float32 bits."""
    if layout.dtype not in _WORDS:
        raise ValueError(f"dtype {layout.dtype}: KV on CPU is one of {', '.join(_WORDS)}")
    return _WORDS[layout.dtype]


def _raw(cache: KVCache) -> NDArray[Any]:
    """All blocks as one flat array of words, without a copy."""
    blocks, layout = cache.blocks, cache.layout
    used = 2 * layout.tokens_per_block * layout.head_dim
    length = (blocks.shape[0] - 1) * blocks.stride(0) + used
    flat: NDArray[Any] = blocks.as_strided((length,), (1,)).view(_word(layout)[0]).numpy()
    return flat


def _gathered(cache: KVCache, layer: int, slot: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """K and V of a sequence's positions `[low, high)`: two float32 `[kv_heads, high - low, head_dim]`."""
    layout = cache.layout
    keys = torch.empty(layout.kv_heads, high - low, layout.head_dim)
    values = torch.empty_like(keys)
    missing = cpu_compiled.gather(
        _raw(cache),
        np.uint32(_word(layout)[1]),
        cache.blocks.stride(0),
        layout.tokens_per_block,
        cache.table[layer, slot].numpy(),
        low,
        keys.view(torch.uint32).numpy(),
        values.view(torch.uint32).numpy(),
    )
    if missing:
        raise UnallocatedBlockError(layer)
    return keys, values


def _attend_gathered(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """`query`, `out` `[n, heads, D]`: the last n of m positions; `keys`, `values` `[kv_heads, m, D]`.

    All float32. Queries go in chunks whose scores are about `_SCORE_ELEMENTS`, each over the keys it may see.
    """
    count, heads, dim = query.shape
    kv_heads, context, _ = keys.shape
    grouped = (query * scale).view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    result = out.view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    chunk = max(32, _SCORE_ELEMENTS // (heads * context))
    history = context - count
    for first in range(0, count, chunk):
        last = min(first + chunk, count)
        low = 0 if window is None else max(0, history + first - window + 1)
        high = history + last
        rows = grouped[:, :, first:last].reshape(kv_heads, -1, dim)
        scores = torch.bmm(rows, keys[:, low:high].transpose(1, 2))
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        distance = torch.arange(history + first, high)[:, None] - torch.arange(low, high)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores.view(kv_heads, -1, last - first, high - low).masked_fill_(hidden, -math.inf)
        weighted = torch.bmm(scores.softmax(-1), values[:, low:high])
        result[:, :, first:last] = weighted.view(kv_heads, -1, last - first, dim)
