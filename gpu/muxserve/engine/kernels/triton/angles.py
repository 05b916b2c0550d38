"""cos and sin of the angles by which tokens are rotated, once for all layers that share them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.kernels.interface import Angles
from muxserve.engine.kernels.triton.language import New, jit, next_power_of_2, tl


def angles(
    positions: Tensor,
    frequencies: Tensor,
    attention_factor: float,
    dtype: torch.dtype,
    *,
    new: New = torch.empty,
) -> Angles:
    """As `Kernels.angles` says. Computed for each batch: a table for a long context would take memory in
    every executor, and this is less than the smallest operation of a layer."""
    count, half = len(positions), len(frequencies)
    cos, sin = (new((count, 1, half), dtype=dtype, device=positions.device) for _ in range(2))
    if count:
        _angles[count,](
            positions, frequencies, cos, sin, attention_factor, HALF=half, PADDED=next_power_of_2(half),
            num_warps=1,
        )  # fmt: skip
    return cos, sin


@jit
def _angles(positions, frequencies, cos, sin, factor, HALF: tl.constexpr, PADDED: tl.constexpr):
    """One token."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    frequency = tl.load(frequencies + i, mask=i < HALF, other=0.0)
    angle = tl.load(positions + n).to(tl.float32) * frequency
    dtype: tl.constexpr = cos.dtype.element_ty
    tl.store(cos + n * HALF + i, (tl.cos(angle) * factor).to(dtype), mask=i < HALF)
    tl.store(sin + n * HALF + i, (tl.sin(angle) * factor).to(dtype), mask=i < HALF)
