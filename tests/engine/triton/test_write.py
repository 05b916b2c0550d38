"""The fused KV write against the decoder's own norm, rotation and split, bit for bit where dtypes allow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Angles, KVCache, QKNorm
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.kernels.triton.write import write_qkv
from muxserve.engine.spec import ITEMSIZE, DType, KVLayout
from tests.engine.test_kernels import arena_of_nan
from tests.engine.triton.attention import moved, ragged

PIECES = [(2, 0, 3), (0, 10, 11), (3, 6, 9)]
"""(slot, begin, end): from the start, one token, and across the border of a block of 7."""
DIFFERENCE = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}
"""A norm's rounding may fall the other way: by one unit in the last place."""


@dataclass
class Case:
    cache: KVCache
    qkv: Tensor
    heads: int
    rotary: int
    norm: QKNorm | None


def make_case(dtype: DType, head_dim: int, heads: int, kv_heads: int, rotary: int, norm: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    layout = KVLayout(
        layers=2,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block_bytes=7 * 2 * head_dim * ITEMSIZE[dtype] + 4,
    )
    order = torch.randperm(2 * 4 * kv_heads * 2, generator=generator, dtype=torch.int32)
    table = order.view(2, 4, kv_heads, 2)
    cache = KVCache.over(arena_of_nan(layout.block_bytes, len(order)), table, layout)
    tokens = sum(end - begin for _, begin, end in PIECES)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(cache.blocks.dtype)
    weights = 0.5 + torch.rand(2, head_dim, generator=generator)
    return Case(
        cache, qkv, heads, rotary, QKNorm(weights[0], weights[1], 1e-6, norm == "late") if norm else None
    )


def reference(case: Case) -> tuple[Tensor, KVCache]:
    """The queries, and what the arena holds after it."""
    batch, cache = ragged(PIECES, torch.device("cpu")), moved(case.cache, torch.device("cpu"))
    turned = angles_of(case, batch.positions)
    query = ReferenceKernels().write(cache, 1, batch, case.qkv, case.heads, turned, case.norm)
    return query, cache


def angles_of(case: Case, positions: Tensor) -> Angles | None:
    if not case.rotary:
        return None
    frequencies = torch.tensor([0.7**i for i in range(case.rotary // 2)])
    return ReferenceKernels().angles(positions, frequencies, 1.1, case.qkv.dtype)


def fused(case: Case, device: torch.device) -> tuple[Tensor, KVCache]:
    batch, cache = ragged(PIECES, device), moved(case.cache, device)
    norm = case.norm and QKNorm(
        case.norm.query.to(device), case.norm.key.to(device), case.norm.eps, case.norm.late
    )
    turned = angles_of(case, batch.positions.cpu())
    if turned is not None:
        turned = (turned[0].to(device), turned[1].to(device))
    query = write_qkv(
        cache, 1, batch.token_slots, batch.positions, case.qkv.to(device), case.heads, turned, norm
    )
    return query.cpu(), moved(cache, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "rotary"),
    [(64, 9, 3, 64), (80, 2, 2, 80), (96, 4, 1, 96), (128, 8, 2, 64), (256, 2, 1, 256), (128, 4, 4, 0)],
)
@pytest.mark.parametrize("norm", ["", "early", "late"])
def test_what_is_written_is_what_the_decoder_would_write(
    device: torch.device, dtype: DType, head_dim: int, heads: int, kv_heads: int, rotary: int, norm: str
) -> None:
    case = make_case(dtype, head_dim, heads, kv_heads, rotary, norm)
    want_query, want_cache = reference(case)
    query, cache = fused(case, device)
    if case.norm is None and dtype != "float32":
        assert torch.equal(query, want_query)
        assert torch.equal(cache.blocks.view(torch.int16), want_cache.blocks.view(torch.int16))
        return
    written = ~want_cache.blocks.isnan()
    largest = max(want_query.abs().max(), want_cache.blocks[written].abs().max())
    bound = DIFFERENCE[dtype] * float(largest)
    assert (query - want_query).abs().max() <= bound
    assert torch.equal(cache.blocks.isnan(), ~written)  # nothing else was touched
    assert (cache.blocks - want_cache.blocks)[written].abs().max() <= bound


def test_padding_and_holes_are_not_written(device: torch.device) -> None:
    case = make_case("float32", 64, 2, 1, 0, "")
    cache = moved(case.cache, device)
    cache.table[1, 2, 0, 0] = -1
    slots = torch.tensor([1 << 40, 2, -1]).to(device)
    positions = torch.tensor([-1, 3, -1]).to(device)
    query = write_qkv(cache, 1, slots, positions, case.qkv[:3].to(device), 2, None)
    assert torch.equal(query.cpu(), case.qkv[:3, :2])
    assert cache.blocks.isnan().all()
