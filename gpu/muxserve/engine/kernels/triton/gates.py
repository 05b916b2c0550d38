"""The gate of an MLP: an activation of one half of a projection, times the other half."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from muxserve.engine.kernels.triton.language import New, jit, tl
from muxserve.engine.kernels.triton.tuning import GATE


def gate_mul(gate_up: Tensor, activation: Literal["silu", "gelu_tanh"], *, new: New = torch.empty) -> Tensor:
    """`activation(gate) * up` of `[N, 2 * size]`, gate first, rows contiguous: a new `[N, size]`. The
    activation is rounded to the dtype before the product is."""
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = new((count, size), dtype=gate_up.dtype, device=gate_up.device)
    if count:
        _gate_mul[count, -(-size // GATE.block)](
            gate_up,
            out,
            gate_up.stride(0),
            SIZE=size,
            SILU=activation == "silu",
            BLOCK=GATE.block,
            num_warps=GATE.warps,
        )
    return out


@jit
def _gate_mul(gate_up, out, stride, SIZE: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one row."""
    dtype: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * stride + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    u = gate
    if not SILU:  # arXiv 1606.08415: (1 + tanh(u / 2)) / 2 is the logistic function of u
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gate = gate / (1 + tl.exp2(-1.4426950408889634 * u))
    tl.store(out + row * SIZE + i, (gate.to(dtype).to(tl.float32) * up).to(dtype), mask=i < SIZE)
