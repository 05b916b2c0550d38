"""Attention over blocks against dense attention over contiguous K and V that never saw a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muxserve.engine.cpu.attention import BlockAttention
from muxserve.engine.cpu.library import VARIANTS, cpu_flags
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.spec import ITEMSIZE, DType, KVLayout

HERE = [name for name, needed in VARIANTS.items() if needed <= cpu_flags()]
"""Builds of the library that this machine can run."""
KERNELS = ["reference", *HERE]
LAYERS = 2
EXACT = {"float32": 2e-5, "bfloat16": 2**-6}
"""Bound on |error| / max(1, |value|). float32 sums in another order. In bfloat16 queries, once scaled, and
the softmax's weights are rounded to 8 bits; all sums are float32."""

Piece = tuple[int, int, int]


class Attention(Protocol):
    """See BlockAttention."""

    def __call__(self, layer: int, pieces: list[Piece], qkv: Tensor) -> Tensor: ...


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


def slots_of(sequences: list[Sequence]) -> list[int]:
    """The last ones first, and one more that nobody has."""
    return list(range(1, len(sequences) + 1))[::-1]


def cache_for(layout: KVLayout, arena: Tensor, sequences: list[Sequence], free: list[int]) -> KVCache:
    """A table whose ids are taken from `free` (any order)."""
    spans = max(layout.spans(s.context) for s in sequences) + 1
    table = torch.full((layout.layers, len(sequences) + 1, layout.kv_heads, spans), -1, dtype=torch.int32)
    for slot, sequence in zip(slots_of(sequences), sequences, strict=True):
        held = layout.spans(sequence.context)
        count = layout.layers * layout.kv_heads * held
        ids = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        table[:, slot, :, :held] = ids.view(layout.layers, layout.kv_heads, held)
    return KVCache.over(arena, table, layout)


class Reference:
    """ReferenceKernels as a BlockAttention."""

    def __init__(
        self, cache: KVCache, heads: int, scale: float, window: int | None, soft_cap: float | None
    ) -> None:
        self._cache, self._heads, self._how = cache, heads, (scale, window, soft_cap)

    def __call__(self, layer: int, pieces: list[Piece], qkv: Tensor) -> Tensor:
        counts = torch.tensor([end - begin for _, begin, end in pieces])
        slots = torch.tensor([slot for slot, _, _ in pieces])
        batch = RaggedBatch(
            slots=slots,
            query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            context_lengths=torch.tensor([end for _, _, end in pieces]),
            positions=torch.cat([torch.arange(begin, end) for _, begin, end in pieces]),
            token_slots=slots.repeat_interleave(counts),
            max_query=int(counts.max()),
            max_context=max(end for _, _, end in pieces),
        )
        kv_heads = self._cache.layout.kv_heads
        assert qkv.shape[1] == self._heads + 2 * kv_heads
        kernels = ReferenceKernels()
        query = kernels.write(self._cache, layer, batch, qkv, self._heads, None, None)
        return kernels.attend(self._cache, layer, batch, query, *self._how)


class Native:
    """BlockAttention over tensors."""

    def __init__(
        self,
        cache: KVCache,
        arena: Tensor,
        heads: int,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        *,
        threads: int = 1,
        variant: str = "",
    ) -> None:
        self.attention = BlockAttention(
            arena.numpy(),
            cache.table.numpy(),
            cache.layout,
            heads=heads,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            threads=threads,
            variant=variant,
        )

    def __call__(self, layer: int, pieces: list[Piece], qkv: Tensor) -> Tensor:
        return torch.from_numpy(self.attention(layer, pieces, qkv.float().numpy()))

    def __del__(self) -> None:
        self.attention.close()


def make(
    name: str,
    cache: KVCache,
    arena: Tensor,
    heads: int,
    window: int | None = None,
    soft_cap: float | None = None,
    threads: int = 1,
) -> Attention:
    scale = cache.layout.head_dim**-0.5
    if name == "reference":
        return Reference(cache, heads, scale, window, soft_cap)
    return Native(cache, arena, heads, scale, window, soft_cap, threads=threads, variant=name)


def dense_attention(
    query: Tensor,
    positions: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`[n, H, D]`, at those positions, over `[kv_heads, m, D]` in float64, whole rows of scores at once."""
    group = query.shape[1] // key.shape[0]
    key, value = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    scores = query.double().transpose(0, 1) @ key.transpose(1, 2) * scale
    if soft_cap is not None:
        scores = scores.div_(soft_cap).tanh_().mul_(soft_cap)
    distance = positions[:, None] - torch.arange(key.shape[1])[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return (scores.masked_fill_(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1)


def rows_of(
    layer: int, parts: list[tuple[Sequence, int, int]], heads: int, generator: torch.Generator
) -> Tensor:
    """qkv of tokens `[begin, end)` of sequences; queries are random, in the KV's dtype."""
    rows = []
    for s, begin, end in parts:
        keys, values = s.keys[layer, :, begin:end], s.values[layer, :, begin:end]
        query = torch.randn(end - begin, heads, keys.shape[-1], generator=generator).to(keys.dtype)
        rows.append(torch.cat([query, keys.transpose(0, 1), values.transpose(0, 1)], dim=1))
    return torch.cat(rows)


MANY, EVERY = 256, 7
"""Of more tokens than that in one piece, every seventh is checked, and the last ones. Seven divides no number
of queries that kernels take at a time, so that all of their lanes have their turn."""


@dataclass
class Call:
    """One call of an attention, and what it is to return: `want` `[n, heads, head_dim]` at `rows`."""

    layer: int
    pieces: list[Piece]
    qkv: Tensor
    rows: Tensor
    want: Tensor

    def check(self, name: str, attention: Attention, bound: float) -> None:
        got = attention(self.layer, self.pieces, self.qkv)
        assert got.shape == (len(self.qkv), *self.want.shape[1:]), name
        assert not got.isnan().any(), name
        error = (got[self.rows].double() - self.want).abs() / self.want.abs().clamp(min=1)
        assert error.max() <= bound, name


def calls(
    layout: KVLayout,
    sequences: list[Sequence],
    heads: int,
    window: int | None,
    soft_cap: float | None,
    generator: torch.Generator,
) -> list[Call]:
    """Of each layer: history first, then the new tokens of all sequences together."""
    found = []
    for layer in range(layout.layers):
        histories = [(s, 0, s.context - s.queries) for s in sequences]
        news = [(s, s.context - s.queries, s.context) for s in sequences]
        for parts in (histories, news):
            slots = [
                slot for slot, (_, begin, end) in zip(slots_of(sequences), parts, strict=True) if begin < end
            ]
            parts = [part for part in parts if part[1] < part[2]]
            if not parts:
                continue
            qkv = rows_of(layer, parts, heads, generator)
            at, rows, wants = 0, [], []
            for s, begin, end in parts:
                chosen = torch.arange(end - begin)
                if len(chosen) > MANY:
                    chosen = chosen[(chosen % EVERY == 0) | (chosen >= len(chosen) - 2 * EVERY)]
                keys, values = s.keys[layer, :, :end], s.values[layer, :, :end]
                how = (layout.head_dim**-0.5, window, soft_cap)
                query = qkv[at + chosen, :heads]
                wants.append(dense_attention(query, begin + chosen, keys, values, *how))
                rows.append(at + chosen)
                at += end - begin
            pieces = [(slot, begin, end) for slot, (_, begin, end) in zip(slots, parts, strict=True)]
            found.append(Call(layer, pieces, qkv, torch.cat(rows), torch.cat(wants)))
    return found


def check(name: str, attention: Attention, work: list[Call], layout: KVLayout) -> None:
    for call in work:
        call.check(name, attention, EXACT[layout.dtype])


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


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_attention_over_blocks_is_dense_attention(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    lengths = data.draw(st.lists(lengths_around(layout.tokens_per_block), min_size=1, max_size=5))
    if not any(queries for _, queries in lengths):
        lengths.append((layout.tokens_per_block, 1))
    heads = layout.kv_heads * data.draw(st.sampled_from([1, 2, 3, 4, 8, 9]))
    window = data.draw(st.none() | st.integers(1, 3 * layout.tokens_per_block))
    soft_cap = data.draw(st.none() | st.sampled_from([0.5, 30.0]))
    threads = data.draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sequences = random_sequences(layout, lengths, generator)
    held = sum(layout.spans(s.context) for s in sequences) * layout.blocks_per_span
    free = torch.randperm(held + 7, generator=generator).tolist()
    work = calls(layout, sequences, heads, window, soft_cap, generator)
    for name in KERNELS:
        arena = arena_of_nan(layout.block_bytes, held + 7)
        cache = cache_for(layout, arena, sequences, free.copy())
        check(name, make(name, cache, arena, heads, window, soft_cap, threads), work, layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (100, 20.0)])
def test_long_mixed_batches_agree_with_dense_attention(
    dtype: DType, window: int | None, soft_cap: float | None
) -> None:
    layout = KVLayout(layers=1, kv_heads=3, head_dim=64, dtype=dtype, block_bytes=16 * 1024)
    generator = torch.Generator().manual_seed(5)
    # Beyond 1,024 keys one token's context is split over threads.
    lengths = [(0, 700), (300, 1), (1500, 3), (0, 1), (900, 600), (1023, 1), (1024, 1), (2500, 1)]
    sequences = random_sequences(layout, lengths, generator)
    held = sum(layout.spans(s.context) for s in sequences) * layout.blocks_per_span
    free = torch.randperm(held, generator=generator).tolist()
    work = calls(layout, sequences, 9, window, soft_cap, generator)
    for name in HERE:
        for threads in (1, 2):
            arena = arena_of_nan(layout.block_bytes, held)
            cache = cache_for(layout, arena, sequences, free.copy())
            check(name, make(name, cache, arena, 9, window, soft_cap, threads), work, layout)


def test_models_of_different_head_size_and_dtype_share_one_arena() -> None:
    block_bytes, blocks = 6000, 400
    arena = arena_of_nan(block_bytes, blocks)
    generator = torch.Generator().manual_seed(3)
    free = torch.randperm(blocks, generator=generator).tolist()
    kinds: list[tuple[int, DType, int]] = [(64, "float32", 2), (128, "bfloat16", 1), (80, "bfloat16", 3)]
    for head_dim, dtype, kv_heads in kinds:
        layout = KVLayout(
            layers=LAYERS, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_bytes=block_bytes
        )
        sequences = random_sequences(layout, [(33, 1), (0, 25), (7, 9)], generator)
        cache = cache_for(layout, arena, sequences, free)
        work = calls(layout, sequences, 2 * kv_heads, None, None, generator)
        check("", make("", cache, arena, 2 * kv_heads), work, layout)


@pytest.fixture
def three() -> Iterator[tuple[Attention, Attention, list[Piece], Tensor]]:
    """Two attentions over one cache, on one thread and on two; three sequences with history; their qkv."""
    layout = KVLayout(layers=1, kv_heads=2, head_dim=64, dtype="bfloat16", block_bytes=4096)
    generator = torch.Generator().manual_seed(2)
    sequences = random_sequences(layout, [(90, 1), (3, 1), (1700, 1)], generator)
    arena = arena_of_nan(4096, 600)
    cache, slots = cache_for(layout, arena, sequences, list(range(600))), slots_of(sequences)
    alone, both = make("", cache, arena, 6), make("", cache, arena, 6, threads=2)
    for slot, s in zip(slots, sequences, strict=True):
        history = s.context - 1
        alone(0, [(slot, 0, history)], rows_of(0, [(s, 0, history)], 6, generator))
    pieces = [(slot, s.context - 1, s.context) for slot, s in zip(slots, sequences, strict=True)]
    qkv = rows_of(0, [(s, s.context - 1, s.context) for s in sequences], 6, generator)
    yield alone, both, pieces, qkv


def test_a_sequence_depends_neither_on_its_batch_nor_on_threads(
    three: tuple[Attention, Attention, list[Piece], Tensor],
) -> None:
    alone, both, pieces, qkv = three
    together = both(0, pieces, qkv)
    for i, piece in enumerate(pieces):
        assert torch.equal(alone(0, [piece], qkv[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("queries", [1, 5])
def test_nan_of_a_model_reaches_its_output_and_no_other(queries: int) -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_dim=64, dtype="float32", block_bytes=4096)
    generator = torch.Generator().manual_seed(2)
    sequences = random_sequences(layout, [(20, queries), (20, queries)], generator)
    sequences[0].values[0, 0, 3, 7] = math.nan
    arena = arena_of_nan(4096, 64)
    cache = cache_for(layout, arena, sequences, list(range(64)))
    attention = make("", cache, arena, 1)
    first, second = slots_of(sequences)
    for slot, s in zip((first, second), sequences, strict=True):
        attention(0, [(slot, 0, 20)], rows_of(0, [(s, 0, 20)], 1, generator))
    end = 20 + queries
    parts = [(s, 20, end) for s in sequences]
    out = attention(0, [(first, 20, end), (second, 20, end)], rows_of(0, parts, 1, generator))
    assert out[:queries, 0, 7].isnan().all()
    assert int(out.isnan().sum()) == queries


@pytest.mark.parametrize("queries", [1, 6])
def test_a_span_without_a_block_is_an_error_and_touches_nothing(queries: int) -> None:
    layout = KVLayout(layers=1, kv_heads=2, head_dim=32, dtype="float32", block_bytes=1024)  # T = 4
    arena = torch.zeros(8 * 1024, dtype=torch.uint8)
    cache = KVCache.over(arena, torch.full((1, 1, 2, 4), -1, dtype=torch.int32), layout)
    attention = make("", cache, arena, 2)
    for absent in (-1, 8, 1 << 30):
        cache.table.fill_(absent)
        with pytest.raises(UnallocatedBlockError, match="layer 0"):
            attention(0, [(0, 7 - queries, 7)], torch.ones(queries, 6, 32))
    assert not arena.any()


@pytest.mark.parametrize("piece", [(1, 0, 1), (-1, 0, 1), (0, 3, 3), (0, -1, 2), (0, 0, 17)])
def test_a_piece_outside_of_the_table_is_refused(piece: Piece) -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_dim=32, dtype="float32", block_bytes=1024)
    arena = torch.zeros(8 * 1024, dtype=torch.uint8)
    cache = KVCache.over(arena, torch.zeros((1, 1, 1, 4), dtype=torch.int32), layout)
    with pytest.raises(JobError):
        make("", cache, arena, 1)(0, [piece], torch.ones(max(0, piece[2] - piece[1]), 3, 32))
