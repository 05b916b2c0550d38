"""Attention over blocks against dense attention over contiguous K and V that never saw a block."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muxserve.engine.kernels.cpu import CpuKernels, UnallocatedBlockError
from muxserve.engine.kernels.interface import AttentionKernels, KVCache, RaggedBatch
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.spec import ITEMSIZE, DType, KVLayout

KERNELS: dict[str, AttentionKernels] = {
    "in place": CpuKernels(in_place_work=1 << 60),
    "gathered": CpuKernels(in_place_work=0),
    "reference": ReferenceKernels(),
}
LAYERS = 2
EXACT = {"float32": 2e-5, "bfloat16": 2**-8}
"""Bound on |error| / max(1, |value|): float32 sums in another order; bfloat16 rounds the result once (half a
unit in the last of 8 bits) on top, as the reference here is given the same bfloat16 inputs."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Sequence:
    """K and V of every layer, contiguous: `[layers, kv_heads, context, head_dim]`."""

    context: int
    queries: int
    keys: Tensor
    values: Tensor


def arena_of_nan(block_bytes: int, blocks: int) -> Tensor:
    """Every word of it is a NaN in float32 and in bfloat16."""
    return torch.full((block_bytes * blocks,), 0xFF, dtype=torch.uint8)


def random_sequences(
    layout: KVLayout, lengths: list[tuple[int, int]], generator: torch.Generator
) -> list[Sequence]:
    """lengths: (history, queries) of each sequence."""
    dtype = getattr(torch, layout.dtype)
    found = []
    for history, queries in lengths:
        shape = (layout.layers, layout.kv_heads, history + queries, layout.head_dim)
        keys, values = torch.randn(2, *shape, generator=generator).to(dtype)
        found.append(Sequence(history + queries, queries, keys, values))
    return found


def cache_for(
    layout: KVLayout, arena: Tensor, sequences: list[Sequence], free: list[int], spare_slots: int = 1
) -> tuple[KVCache, Tensor]:
    """A table whose ids are taken from `free` (any order); returns it and each sequence's slot."""
    slots = list(range(len(sequences) + spare_slots))[::-1][: len(sequences)]
    spans = max(layout.spans(s.context) for s in sequences) + 1
    table = torch.full(
        (layout.layers, len(sequences) + spare_slots, layout.kv_heads, spans), -1, dtype=torch.int32
    )
    for slot, sequence in zip(slots, sequences, strict=True):
        held = layout.spans(sequence.context)
        count = layout.layers * layout.kv_heads * held
        ids = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        table[:, slot, :, :held] = ids.view(layout.layers, layout.kv_heads, held)
    return KVCache.over(arena, table, layout), torch.tensor(slots)


def batch_of(slots: Tensor, contexts: list[int], queries: list[int]) -> RaggedBatch:
    positions = [torch.arange(c - q, c) for c, q in zip(contexts, queries, strict=True)]
    return RaggedBatch(
        slots=slots,
        query_starts=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int64),
        context_lengths=torch.tensor(contexts),
        positions=torch.cat(positions),
        token_slots=slots.repeat_interleave(torch.tensor(queries)),
        max_query=max(queries),
        max_context=max(contexts),
    )


def fill(kernels: AttentionKernels, cache: KVCache, slots: Tensor, sequences: list[Sequence]) -> None:
    """Write history and then the new tokens of every sequence, in every layer."""
    for part in ("history", "new"):
        counts = [s.context - s.queries if part == "history" else s.queries for s in sequences]
        if not any(counts):
            continue
        ends = [s.context - s.queries if part == "history" else s.context for s in sequences]
        batch = batch_of(slots, ends, counts)
        for layer in range(cache.layout.layers):
            rows = [
                (s.keys[layer, :, e - c : e], s.values[layer, :, e - c : e])
                for s, c, e in zip(sequences, counts, ends, strict=True)
            ]
            keys = torch.cat([k for k, _ in rows], dim=1).transpose(0, 1)  # [N, kv_heads, D], not contiguous
            values = torch.cat([v for _, v in rows], dim=1).transpose(0, 1)
            kernels.write(cache, layer, batch, keys, values)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """`[n, H, D]` over `[kv_heads, m, D]` in float64, with the whole score matrix at once."""
    count, heads, _ = query.shape
    group, context = heads // key.shape[0], key.shape[1]
    key, value = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    distance = torch.arange(context - count, context)[:, None] - torch.arange(context)[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1)


def check(
    kernels: AttentionKernels,
    cache: KVCache,
    slots: Tensor,
    sequences: list[Sequence],
    group: int,
    window: int | None,
    soft_cap: float | None,
    generator: torch.Generator,
) -> None:
    layout = cache.layout
    batch = batch_of(slots, [s.context for s in sequences], [s.queries for s in sequences])
    total, heads = int(batch.query_starts[-1]), layout.kv_heads * group
    scale = layout.head_dim**-0.5
    for layer in range(layout.layers):
        query = torch.randn(total, heads, layout.head_dim, generator=generator).to(
            getattr(torch, layout.dtype)
        )
        got = kernels.attend(cache, layer, batch, query, scale, window, soft_cap)
        assert got.dtype == query.dtype
        assert got.shape == query.shape
        for s, sequence in enumerate(sequences):
            rows = slice(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
            want = dense_attention(
                query[rows], sequence.keys[layer], sequence.values[layer], scale, window, soft_cap
            )
            error = (got[rows].double() - want).abs() / want.abs().clamp(min=1)
            assert not error.isnan().any()
            assert not (error > EXACT[layout.dtype]).any()


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    """T from 1 up, mostly no power of two, mostly with an unused tail."""
    dtype: DType = draw(st.sampled_from(["float32", "bfloat16"]))
    head_dim = draw(st.sampled_from([32, 64, 80, 96, 128, 256, 34]))
    token_bytes = 2 * head_dim * ITEMSIZE[dtype]
    tokens = draw(st.integers(1, 9))
    tail = draw(st.integers(0, token_bytes // 8 - 1)) * 8
    return KVLayout(
        layers=LAYERS,
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        dtype=dtype,
        block_bytes=tokens * token_bytes + tail,
    )


def lengths_around(tokens_per_block: int) -> st.SearchStrategy[tuple[int, int]]:
    """(history, queries) with the context at least 1, on and beside block borders."""
    border = st.builds(lambda n, d: max(0, n * tokens_per_block + d), st.integers(0, 4), st.integers(-1, 1))
    return st.tuples(border, st.one_of(st.just(1), st.just(0), border)).filter(lambda pair: sum(pair) > 0)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_attention_over_blocks_is_dense_attention(name: str, data: st.DataObject) -> None:
    layout = data.draw(layouts())
    lengths = data.draw(st.lists(lengths_around(layout.tokens_per_block), min_size=1, max_size=5))
    if not any(queries for _, queries in lengths):
        lengths.append((layout.tokens_per_block, 1))
    group = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    window = data.draw(st.none() | st.integers(1, 3 * layout.tokens_per_block))
    soft_cap = data.draw(st.none() | st.sampled_from([0.5, 30.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sequences = random_sequences(layout, lengths, generator)
    held = sum(layout.spans(s.context) for s in sequences) * layout.blocks_per_span
    free = torch.randperm(held + 7, generator=generator).tolist()
    cache, slots = cache_for(layout, arena_of_nan(layout.block_bytes, held + 7), sequences, free)
    fill(KERNELS[name], cache, slots, sequences)
    check(KERNELS[name], cache, slots, sequences, group, window, soft_cap, generator)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (100, 20.0)])
def test_long_mixed_batches_agree_with_dense_attention(
    threads: int, dtype: DType, window: int | None, soft_cap: float | None
) -> None:
    torch.set_num_threads(threads)
    layout = KVLayout(layers=1, kv_heads=3, head_dim=64, dtype=dtype, block_bytes=16 * 1024)
    generator = torch.Generator().manual_seed(5)
    lengths = [(0, 700), (300, 1), (1500, 3), (0, 1), (900, 600), (64, 0)]
    sequences = random_sequences(layout, lengths, generator)
    held = sum(layout.spans(s.context) for s in sequences) * layout.blocks_per_span
    free = torch.randperm(held, generator=generator).tolist()
    cache, slots = cache_for(layout, arena_of_nan(layout.block_bytes, held), sequences, free)
    kernels = CpuKernels()
    fill(kernels, cache, slots, sequences)
    check(kernels, cache, slots, sequences, 3, window, soft_cap, generator)


def test_models_of_different_head_size_and_dtype_share_one_arena() -> None:
    block_bytes, blocks = 6000, 400
    arena = arena_of_nan(block_bytes, blocks)
    generator = torch.Generator().manual_seed(3)
    free = torch.randperm(blocks, generator=generator).tolist()
    kernels = CpuKernels()
    models = []
    kinds: list[tuple[int, DType, int]] = [(64, "float32", 2), (128, "bfloat16", 1), (80, "bfloat16", 3)]
    for head_dim, dtype, kv_heads in kinds:
        layout = KVLayout(
            layers=LAYERS, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_bytes=block_bytes
        )
        sequences = random_sequences(layout, [(33, 1), (0, 25), (7, 9)], generator)
        models.append((*cache_for(layout, arena, sequences, free), sequences))
    for cache, slots, sequences in models:
        fill(kernels, cache, slots, sequences)
    for cache, slots, sequences in models:
        check(kernels, cache, slots, sequences, 2, None, None, generator)


def test_threads_of_a_process_may_attend_at_the_same_time() -> None:
    torch.set_num_threads(2)
    layout = KVLayout(layers=1, kv_heads=2, head_dim=64, dtype="bfloat16", block_bytes=4096)
    generator = torch.Generator().manual_seed(1)
    sequences = random_sequences(layout, [(50, 1), (200, 1)], generator)
    cache, slots = cache_for(layout, arena_of_nan(4096, 64), sequences, list(range(64)))
    kernels = CpuKernels()
    fill(kernels, cache, slots, sequences)
    batch = batch_of(slots, [51, 201], [1, 1])
    query = torch.randn(2, 4, 64, generator=generator).bfloat16()
    want = kernels.attend(cache, 0, batch, query, 0.125, None, None)
    right: list[bool] = []

    def attend() -> None:
        for _ in range(200):
            got = kernels.attend(cache, 0, batch, query, 0.125, None, None)
            right.append(torch.equal(got, want))

    threads = [threading.Thread(target=attend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 600
    assert all(right)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_does_not_depend_on_its_batch(threads: int) -> None:
    torch.set_num_threads(threads)
    layout = KVLayout(layers=1, kv_heads=2, head_dim=64, dtype="float32", block_bytes=4096)
    generator = torch.Generator().manual_seed(2)
    sequences = random_sequences(layout, [(90, 1), (3, 1), (40, 1)], generator)
    cache, slots = cache_for(layout, arena_of_nan(4096, 200), sequences, list(range(200)))
    kernels = CpuKernels()
    fill(kernels, cache, slots, sequences)
    query = torch.randn(3, 6, 64, generator=generator)
    together = kernels.attend(cache, 0, batch_of(slots, [91, 4, 41], [1, 1, 1]), query, 0.125, None, None)
    for s, context in enumerate([91, 4, 41]):
        rows = slice(s, s + 1)
        alone = kernels.attend(
            cache, 0, batch_of(slots[rows], [context], [1]), query[rows], 0.125, None, None
        )
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("queries", [1, 5])
def test_nan_of_a_model_reaches_its_output_and_no_other(queries: int) -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_dim=64, dtype="float32", block_bytes=4096)
    generator = torch.Generator().manual_seed(2)
    sequences = random_sequences(layout, [(20, queries), (20, queries)], generator)
    sequences[0].values[0, 0, 3, 7] = math.nan
    cache, slots = cache_for(layout, arena_of_nan(4096, 64), sequences, list(range(64)))
    kernels = CpuKernels()
    fill(kernels, cache, slots, sequences)
    context = 20 + queries
    batch = batch_of(slots, [context, context], [queries, queries])
    out = kernels.attend(cache, 0, batch, torch.ones(2 * queries, 1, 64), 0.125, None, None)
    assert out[:queries, 0, 7].isnan().all()
    assert int(out.isnan().sum()) == queries


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("name", ["in place", "gathered"])
def test_a_span_without_a_block_is_an_error_and_touches_nothing(name: str, queries: int) -> None:
    layout = KVLayout(layers=1, kv_heads=2, head_dim=32, dtype="float32", block_bytes=1024)  # T = 4
    arena = torch.zeros(8 * 1024, dtype=torch.uint8)
    cache = KVCache.over(arena, torch.full((1, 1, 2, 4), -1, dtype=torch.int32), layout)
    batch = batch_of(torch.tensor([0]), [7], [queries])
    tokens = torch.ones(queries, 2, 32)
    with pytest.raises(UnallocatedBlockError, match="layer 0"):
        KERNELS[name].write(cache, 0, batch, tokens, tokens)
    with pytest.raises(UnallocatedBlockError, match="layer 0"):
        KERNELS[name].attend(cache, 0, batch, tokens, 0.2, None, None)
    assert not arena.any()


def test_float16_is_refused() -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_dim=32, dtype="float16", block_bytes=1024)
    cache = KVCache.over(
        torch.zeros(1024, dtype=torch.uint8), torch.zeros(1, 1, 1, 1, dtype=torch.int32), layout
    )
    token = torch.ones(1, 1, 32)
    with pytest.raises(ValueError, match="float16"):
        CpuKernels().write(cache, 0, batch_of(torch.tensor([0]), [1], [1]), token, token)
