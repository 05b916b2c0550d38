"""Triton's attention over blocks against dense attention over contiguous K and V, in a poisoned arena."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.kernels.triton.decode import decode_attention
from muxserve.engine.kernels.triton.prefill import prefill_attention
from muxserve.engine.kernels.triton.tuning import DecodeLaunch, PrefillLaunch, splits
from muxserve.engine.spec import ITEMSIZE, DType, KVLayout
from tests.engine.test_kernels import (
    Sequence,
    arena_of_nan,
    cache_for,
    calls,
    dense_attention,
    lengths_around,
    random_sequences,
    slots_of,
)
from tests.engine.triton.attention import TritonAttention, moved

EXACT = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}
"""Bound on |error| / max(1, |value|). float32 sums in another order. In the others the softmax's weights
and the result are rounded, to 8 and 11 bits; all sums are float32."""
HEAD_DIMS = [64, 80, 96, 128, 256]
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(
    layout: KVLayout, contexts: list[int], device: torch.device, seed: int = 0
) -> tuple[list[Sequence], KVCache]:
    """Sequences of those lengths and a cache, free blocks NaN, that holds all of their KV."""
    generator = torch.Generator().manual_seed(seed)
    sequences = random_sequences(layout, [(context, 0) for context in contexts], generator)
    held = sum(layout.spans(context) for context in contexts) * layout.blocks_per_span
    order = torch.randperm(held + 5, generator=generator).tolist()
    cache = cache_for(layout, arena_of_nan(layout.block_bytes, held + 5), sequences, order)
    for s, slot in zip(sequences, slots_of(sequences), strict=True):
        for position in range(s.context):
            span, offset = divmod(position, layout.tokens_per_block)
            ids = cache.table[:, slot, :, span].long()
            cache.blocks[ids, 0, offset] = s.keys[:, :, position]
            cache.blocks[ids, 1, offset] = s.values[:, :, position]
    return sequences, moved(cache, device)


def of_tokens(head_dim: int, dtype: DType, tokens: int, kv_heads: int = 2) -> KVLayout:
    return KVLayout(
        layers=1,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block_bytes=tokens * 2 * head_dim * ITEMSIZE[dtype],
    )


def blocks_of_16_kib(head_dim: int, dtype: DType) -> KVLayout:
    return KVLayout(layers=1, kv_heads=1, head_dim=head_dim, dtype=dtype, block_bytes=16 * 1024)


def assert_close(got: Tensor, want: Tensor, dtype: DType) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).abs() / want.abs().clamp(min=1)
    assert (error <= EXACT[dtype]).all()


@QUICK
@given(data=st.data())
def test_mixed_batches_with_history(data: st.DataObject, device: torch.device) -> None:
    dtype: DType = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    head_dim = data.draw(st.sampled_from(HEAD_DIMS))
    layout = of_tokens(head_dim, dtype, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2)))
    # Half of them with a tail that holds no token.
    layout = msgspec.structs.replace(
        layout, block_bytes=layout.block_bytes + data.draw(st.sampled_from([0, 8]))
    )
    lengths = data.draw(st.lists(lengths_around(layout.tokens_per_block), min_size=1, max_size=3))
    heads = layout.kv_heads * data.draw(st.sampled_from([1, 3, 4, 8]))
    window = data.draw(st.none() | st.integers(1, 3 * layout.tokens_per_block))
    soft_cap = data.draw(st.none() | st.sampled_from([0.5, 30.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sequences = random_sequences(layout, lengths, generator)
    held = sum(layout.spans(s.context) for s in sequences) * layout.blocks_per_span
    order = torch.randperm(held + 7, generator=generator).tolist()
    cache = cache_for(layout, arena_of_nan(layout.block_bytes, held + 7), sequences, order)
    attention = TritonAttention(cache, device, heads, window, soft_cap)
    for call in calls(layout, sequences, heads, window, soft_cap, generator):
        call.check("triton", attention, EXACT[dtype])


@pytest.mark.parametrize(("most_splits", "stages"), [(1, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (33, None), (33, 20.0)])
def test_decode_of_any_length_in_any_number_of_splits(
    device: torch.device, window: int | None, soft_cap: float | None, most_splits: int, stages: int
) -> None:
    layout = of_tokens(64, "float32", 7)
    contexts = [1, 6, 7, 8, 16, 33, 34, 64, 131]
    sequences, cache = filled(layout, contexts, device)
    query = torch.randn(len(contexts), 6, 64, generator=torch.Generator().manual_seed(1))
    launch = DecodeLaunch(16, 4, stages, 16, 100, most_splits)
    assert splits(device, launch, 2 * len(contexts), 131) == most_splits
    slots, lengths = torch.tensor(slots_of(sequences)), torch.tensor(contexts)
    got = decode_attention(
        cache,
        0,
        slots.to(device),
        lengths.to(device),
        query.to(device),
        0.3,
        window,
        soft_cap,
        longest=131,
        launch=launch,
    )
    for i, s in enumerate(sequences):
        last = torch.tensor([s.context - 1])
        want = dense_attention(query[i : i + 1], last, s.keys[0], s.values[0], 0.3, window, soft_cap)
        assert_close(got[i : i + 1], want, "float32")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "group"), [("bfloat16", 1), ("float16", 3), ("bfloat16", 8)])
def test_decode_with_blocks_of_16_kib(device: torch.device, head_dim: int, dtype: DType, group: int) -> None:
    layout = blocks_of_16_kib(head_dim, dtype)
    tokens = layout.tokens_per_block
    contexts = [tokens - 1, tokens, tokens + 1, 300]
    sequences, cache = filled(layout, contexts, device)
    query = torch.randn(4, group, head_dim, generator=torch.Generator().manual_seed(1)).to(cache.blocks.dtype)
    slots, lengths = torch.tensor(slots_of(sequences)), torch.tensor(contexts)
    how = (head_dim**-0.5, None, None)
    got = decode_attention(
        cache, 0, slots.to(device), lengths.to(device), query.to(device), *how, longest=300
    )
    for i, s in enumerate(sequences):
        last = torch.tensor([s.context - 1])
        want = dense_attention(query[i : i + 1], last, s.keys[0], s.values[0], *how)
        assert_close(got[i : i + 1], want, dtype)


@pytest.mark.parametrize("most_splits", [1, 3])
def test_a_row_of_length_0_is_zeros_and_its_slot_is_never_looked_up(
    device: torch.device, most_splits: int
) -> None:
    layout = of_tokens(80, "float32", 4)
    sequences, cache = filled(layout, [40, 9], device)
    slots = torch.tensor([1 << 40, slots_of(sequences)[0], 1 << 40]).to(device)
    lengths = torch.tensor([0, 40, 0]).to(device)
    query = torch.full((3, 2, 80), math.nan).to(device)
    query[1] = 1
    launch = DecodeLaunch(16, 4, 2, 16, 100, most_splits)
    out = decode_attention(cache, 0, slots, lengths, query, 1.0, None, None, longest=40, launch=launch)
    assert not out[0].any()
    assert not out[2].any()
    last = torch.tensor([39])
    want = dense_attention(
        torch.ones(1, 2, 80), last, sequences[0].keys[0], sequences[0].values[0], 1.0, None, None
    )
    assert_close(out[1:2], want, "float32")


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (19, 5.0), (1, None)])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_prefill_of_many_sequences_in_small_tiles(
    device: torch.device, window: int | None, soft_cap: float | None, group: int
) -> None:
    layout = of_tokens(64, "float32", 5, kv_heads=1)
    contexts, queries = [1, 50, 40, 9, 30, 90], [1, 50, 7, 0, 1, 26]
    sequences, cache = filled(layout, contexts, device)
    count = sum(queries)
    query = torch.randn(count + 9, group, 64, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, *queries]).cumsum(0)
    got = prefill_attention(
        cache,
        0,
        torch.tensor(slots_of(sequences)).to(device),
        starts.to(device),
        torch.tensor(contexts).to(device),
        query.to(device),
        0.3,
        window,
        soft_cap,
        launch=PrefillLaunch(16, 16, 4, 2),
    )
    for i, s in enumerate(sequences):
        begin, end = int(starts[i]), int(starts[i + 1])
        at = torch.arange(s.context - (end - begin), s.context)
        want = dense_attention(query[begin:end], at, s.keys[0], s.values[0], 0.3, window, soft_cap)
        assert_close(got[begin:end], want, "float32")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill_with_blocks_of_16_kib(device: torch.device, head_dim: int) -> None:
    layout = blocks_of_16_kib(head_dim, "bfloat16")
    sequences, cache = filled(layout, [150], device)
    query = torch.randn(70, 4, head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    one = torch.tensor(slots_of(sequences)).to(device)
    starts, contexts = torch.tensor([0, 70]).to(device), torch.tensor([150]).to(device)
    how = (head_dim**-0.5, 100, None)
    got = prefill_attention(cache, 0, one, starts, contexts, query.to(device), *how)
    s = sequences[0]
    assert_close(got, dense_attention(query, torch.arange(80, 150), s.keys[0], s.values[0], *how), "bfloat16")


def test_a_hole_in_the_table_is_not_read(device: torch.device) -> None:
    """It is a fault of whoever fills the table; what it must not become is another model's KV in a result."""
    layout = of_tokens(64, "float32", 4, kv_heads=1)
    _, cache = filled(layout, [40], device)
    cache.table[0, 1, 0, 3] = -1
    arena = cache.blocks.clone()
    arena[...] = 7.0
    cache = replace(cache, blocks=arena)
    one, contexts = torch.tensor([1]).to(device), torch.tensor([40]).to(device)
    query = torch.zeros(5, 1, 64).to(device)
    how = (1.0, None, None)
    decoded = decode_attention(cache, 0, one, contexts, query[:1], *how, longest=40)
    prefilled = prefill_attention(cache, 0, one, torch.tensor([0, 5]).to(device), contexts, query, *how)
    assert torch.allclose(decoded, torch.full_like(decoded, 7 * 36 / 40))
    assert torch.allclose(prefilled[4], decoded[0])
