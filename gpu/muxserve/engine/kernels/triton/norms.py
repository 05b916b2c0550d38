"""RMSNorm of a residual stream, in one pass with the additions around it. Rounds as `Norm` says."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Norm
from muxserve.engine.kernels.triton.language import New, jit, tl
from muxserve.engine.kernels.triton.tuning import norm_launch


def rms_norm(x: Tensor, norm: Norm, *, new: New = torch.empty) -> Tensor:
    """Norm of `x` `[N, size]`, contiguous rows; a new tensor."""
    return _launch(x, None, norm, None, new)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: Norm, before: Norm | None = None, *, new: New = torch.empty
) -> Tensor:
    """Add `x` `[N, size]` to `residual`, in place, and return its norm, a new tensor.

    before: a norm that `x` goes through before it is added (Gemma); it differs from `norm` in its weights
    alone. Both are of one dtype, their rows contiguous.
    """
    return _launch(x, residual, norm, before, new)


def _launch(x: Tensor, residual: Tensor | None, norm: Norm, before: Norm | None, new: New) -> Tensor:
    count, size = x.shape
    out = new((count, size), dtype=x.dtype, device=x.device)
    if not count:
        return out
    launch = norm_launch(size)
    _rms_norm[count,](
        x,
        x if residual is None else residual,
        norm.weight if before is None else before.weight,
        norm.weight,
        out,
        norm.eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        SIZE=size,
        BLOCK=launch.block,
        ADD=residual is not None,
        BEFORE=before is not None,
        LATE=norm.late,
        num_warps=launch.warps,
    )
    return out


@jit
def _rms_norm(
    x,
    residual,
    before,
    weight,
    out,
    eps,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    BEFORE: tl.constexpr,
    LATE: tl.constexpr,
):
    """One row, all of it in registers."""
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    y = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        y = _normed(y, tl.load(before + i, mask=inside, other=0.0), eps, SIZE, LATE, dtype).to(tl.float32)
    if ADD:
        place = residual + row * residual_stride + i
        summed = (y + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(place, summed, mask=inside)
        y = summed.to(tl.float32)
    y = _normed(y, tl.load(weight + i, mask=inside, other=0.0), eps, SIZE, LATE, dtype)
    tl.store(out + row * SIZE + i, y, mask=inside)


@jit
def _normed(y, weight, eps, SIZE: tl.constexpr, LATE: tl.constexpr, dtype: tl.constexpr):
    """The norm of float32 `y`, whose elements past SIZE are 0, in `dtype`."""
    y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)
    if LATE:
        return (y * weight).to(dtype)
    return (y.to(dtype).to(tl.float32) * weight.to(dtype).to(tl.float32)).to(dtype)
