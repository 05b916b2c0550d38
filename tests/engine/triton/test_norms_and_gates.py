"""Fused norms and gates against the decoder's own operations, one after another."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from muxserve.engine.kernels.interface import Norm
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.kernels.triton.angles import angles
from muxserve.engine.kernels.triton.gates import gate_mul
from muxserve.engine.kernels.triton.norms import add_rms_norm, rms_norm

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
    norm, there = Norm(weight, 1e-5, late), Norm(weight.to(device), 1e-5, late)
    reference = ReferenceKernels()
    assert_close(rms_norm(x.to(device), there), reference.norm(x, norm))

    total = residual.to(device, copy=True)
    got = add_rms_norm(x.to(device), total, there)
    assert torch.equal(total.cpu(), residual + x)
    assert_close(got, reference.norm(residual + x, norm))

    total = residual.to(device, copy=True)
    got = add_rms_norm(x.to(device), total, there, Norm(before.to(device), 1e-5, late))
    want = residual.clone()
    normed = reference.add_norm(x, want, norm, Norm(before, 1e-5, late))
    assert_close(total, want)
    assert_close(got, normed)


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


@pytest.mark.parametrize("half", [32, 40, 1])
def test_angles(device: torch.device, dtype: torch.dtype, half: int) -> None:
    positions = torch.tensor([0, 1, 77, 4095, 131_071, -1])
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    found = angles(positions.to(device), frequencies.to(device), 1.2, dtype)
    for got, want in zip(found, ReferenceKernels().angles(positions, frequencies, 1.2, dtype), strict=True):
        assert_close(got, want)


def test_no_rows_are_no_launch(device: torch.device) -> None:
    nothing = torch.empty(0, 64, device=device)
    norm = Norm(torch.ones(64, device=device), 1e-5, late=False)
    assert rms_norm(nothing, norm).shape == (0, 64)
    assert gate_mul(nothing, "silu").shape == (0, 32)
