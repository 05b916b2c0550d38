"""Fused norms and gates against the decoder's own operations, one after another."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from muxserve.engine.kernels.triton.gates import gate_mul
from muxserve.engine.kernels.triton.norms import add_rms_norm, rms_norm
from muxserve.engine.models.norm import RMSNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Bound on |error| / max(1, |size|): a rounding that falls the other way; in float32, another sum."""


def assert_close(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor | None = None) -> None:
    """size: of what the value was computed from, if that is not the value's own."""
    assert got.dtype == want.dtype
    bound = (want if size is None else size).double().abs().clamp(min=1) * ULP[want.dtype]
    assert ((got.cpu().double() - want.double()).abs() <= bound).all()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("size", [576, 1024, 60])
def test_norms_with_and_without_a_residual(
    device: torch.device, dtype: torch.dtype, size: int, late: bool
) -> None:
    generator = torch.Generator().manual_seed(size)
    wide, stream = torch.randn(2, 5, size + 8, generator=generator).to(dtype)
    x = wide[:, :size]  # rows further apart than they are long
    residual = stream[:, :size]
    weight, before = 0.5 + torch.rand(2, size, generator=generator)
    norm = RMSNorm(weight, 1e-5, dtype, late=late)
    how = (weight.to(device), 1e-5)
    assert_close(rms_norm(x.to(device), *how, late=late), norm(x))

    total = residual.to(device, copy=True)
    got = add_rms_norm(x.to(device), total, *how, late=late)
    assert torch.equal(total.cpu(), residual + x)
    assert_close(got, norm(residual + x))

    total = residual.to(device, copy=True)
    got = add_rms_norm(x.to(device), total, *how, late=late, before=before.to(device))
    want = residual + RMSNorm(before, 1e-5, dtype, late=late)(x)
    assert_close(total, want)
    assert_close(got, norm(want))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [96, 1536])
def test_gates(
    device: torch.device, dtype: torch.dtype, activation: Literal["silu", "gelu_tanh"], size: int
) -> None:
    gate_up = (torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    gate_up[0, :4] = torch.tensor([100.0, -100.0, 0.0, -0.0])
    gate, up = gate_up.chunk(2, dim=1)
    want = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    # torch's GELU is 1 + tanh: it cancels where the gate is negative.
    assert_close(gate_mul(gate_up.to(device), activation), want, size=gate * up)


def test_no_rows_are_no_launch(device: torch.device) -> None:
    nothing = torch.empty(0, 64, device=device)
    weight = torch.ones(64, device=device)
    assert rms_norm(nothing, weight, 1e-5, late=False).shape == (0, 64)
    assert gate_mul(nothing, "silu").shape == (0, 32)
