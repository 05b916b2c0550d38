"""What happens to a token's Q, K and V between their projection and attention, in one pass over them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Angles, KVCache, QKNorm
from muxserve.engine.kernels.triton.language import New, jit, next_power_of_2, tl
from muxserve.engine.kernels.triton.tuning import write_launch


def write_qkv(
    cache: KVCache,
    layer: int,
    slots: Tensor,
    positions: Tensor,
    qkv: Tensor,
    heads: int,
    angles: Angles | None,
    norm: QKNorm | None = None,
    *,
    new: New = torch.empty,
) -> Tensor:
    """Normalise queries and keys, rotate them, and store keys and values in their blocks.

    qkv: `[N, heads + 2 * kv_heads, head_dim]`, its last two axes contiguous. slots, positions: int64 `[N]`;
    a row whose position is negative is padding and stores nothing. angles: None = no rotation. Returns
    the queries, a new `[N, heads, head_dim]`. Rounds as the reference does. A span without a block is not
    written.
    """
    layout = cache.layout
    count, rows, dim = qkv.shape
    query = new((count, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if not count:
        return query
    cos, sin = angles if angles is not None else (qkv, qkv)
    half = cos.shape[-1] if angles is not None else 0
    table = cache.table[layer]
    launch = write_launch(qkv.device, dim)
    _write[count, -(-rows // launch.heads)](
        qkv,
        query,
        cache.blocks,
        table,
        slots,
        positions,
        cos,
        sin,
        norm.query if norm else qkv,
        norm.key if norm else qkv,
        norm.eps if norm else 0.0,
        qkv.stride(0),
        cache.blocks.stride(0),
        table.stride(0),
        table.stride(1),
        HEADS=heads,
        KV_HEADS=layout.kv_heads,
        DIM=dim,
        PADDED=next_power_of_2(dim),
        HALF=half,
        TOKENS=layout.tokens_per_block,
        NORM=norm is not None,
        LATE=norm is not None and norm.late,
        AT_ONCE=launch.heads,
        num_warps=launch.warps,
    )
    return query


@jit
def _write(
    qkv,
    query,
    blocks,
    table,
    slots,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    block_stride,
    slot_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One token, AT_ONCE of its heads."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    d = tl.arange(0, PADDED)
    # The element that each one is rotated with. It is read a second time, which costs little: it is in L1.
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < DIM)[None, :]
    row = qkv + n * qkv_stride + head[:, None] * DIM
    own = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = own
    is_key = head >= HEADS
    if NORM:
        factor = tl.rsqrt(tl.sum(own * own, 1) / DIM + eps)[:, None]
        y = _normed(own, factor, is_key, q_norm, k_norm, d, DIM, LATE, dtype)
    if HALF > 0:
        other = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            other = _normed(other, factor, is_key, q_norm, k_norm, partner, DIM, LATE, dtype)
        angle = n * HALF + tl.where(d < HALF, d, d - HALF)
        rotary = d < 2 * HALF
        c = tl.load(cos + angle, mask=rotary, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=rotary, other=0.0).to(tl.float32)
        # Both products are rounded before they are added.
        straight = (y * c[None, :]).to(dtype).to(tl.float32)
        crossed = (other * s[None, :]).to(dtype).to(tl.float32)
        rotated = tl.where((d < HALF)[None, :], straight - crossed, straight + crossed)
        y = tl.where(rotary[None, :], rotated, y)
    is_value = head >= HEADS + KV_HEADS
    y = tl.where(is_value[:, None], own, y)
    out = query + n * HEADS * DIM + head[:, None] * DIM + d[None, :]
    tl.store(out, y.to(dtype), mask=inside & (head < HEADS)[:, None])

    position = tl.load(positions + n).to(tl.int32)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    stored = is_key & (head < HEADS + 2 * KV_HEADS) & (position >= 0)
    slot = tl.load(slots + n)
    ids = tl.load(
        table + slot * slot_stride + kv_head * head_stride + position // TOKENS, mask=stored, other=-1
    )
    place = ids.to(tl.int64) * block_stride + (tl.where(is_value, TOKENS, 0) + position % TOKENS) * DIM
    kv_dtype: tl.constexpr = blocks.dtype.element_ty
    y = y.to(dtype).to(tl.float32).to(kv_dtype)
    tl.store(blocks + place[:, None] + d[None, :], y, mask=inside & (stored & (ids >= 0))[:, None])


@jit
def _normed(x, factor, is_key, q_norm, k_norm, d, DIM: tl.constexpr, LATE: tl.constexpr, dtype: tl.constexpr):
    """`x * factor` times its head's weights, rounded as `dtype` asks for, in float32."""
    of_query = tl.load(q_norm + d, mask=d < DIM, other=0.0)
    of_key = tl.load(k_norm + d, mask=d < DIM, other=0.0)
    weight = tl.where(is_key[:, None], of_key[None, :], of_query[None, :])
    if LATE:
        y = x * factor * weight
    else:
        y = (x * factor).to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)
    return y.to(dtype).to(tl.float32)
