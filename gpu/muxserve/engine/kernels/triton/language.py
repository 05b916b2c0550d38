"""Triton, where it is installed, and the few operations that every kernel here is made of.

Importing this package needs no GPU and not even Triton: launching a kernel does. TRITON_INTERPRET=1, set
before the first import, makes every kernel an interpreted one, on CPU tensors.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    if triton.knobs.runtime.interpret:
        from muxserve.engine.kernels.triton.interpreting import mend

        mend()
else:
    triton, tl = None, None

__all__ = ["New", "exponents", "jit", "key_rows", "next_power_of_2", "precision", "tanh", "tl"]

_LOG2_E = 1.4426950408889634


class New(Protocol):
    """Where a launch takes memory from, for its result and for what it needs meanwhile: `torch.empty`, unless
    the caller has better."""

    def __call__(self, shape: tuple[int, ...], /, *, dtype: torch.dtype, device: torch.device) -> Tensor: ...


class _Missing:
    """In place of a kernel where Triton is not installed."""

    def __getitem__(self, grid: object) -> Any:
        raise ModuleNotFoundError("GPU kernels need Triton: install muxserve[cuda]", name="triton")


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`. A kernel stays a plain Python function for whoever reads it."""
    return _Missing() if triton is None else triton.jit(kernel)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, which is positive."""
    return 1 << (n - 1).bit_length()


def precision(itemsize: int) -> str:
    """How `tl.dot` multiplies operands of that many bytes: float32 exactly, not as TF32."""
    return "ieee" if itemsize == 4 else "tf32"


def exponents(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """What to multiply scores by, and what their tanh (0 = there is none), so that exp2 is softmax's exp."""
    return (scale * _LOG2_E, 0.0) if soft_cap is None else (scale / soft_cap, soft_cap * _LOG2_E)


@jit
def tanh(x):
    """To an absolute error of 2^-23: the difference cancels near 0."""
    return 1 - 2 / (1 + tl.exp2(2.8853900817779268 * x))


@jit
def key_rows(table_row, keys, wanted, block_stride, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Where the K of some keys of one sequence and KV head lie: (elements from the arena's start, int64;
    whether there is a block). V is `TOKENS * DIM` further on.

    table_row: int32 `[spans]`; keys: int32 positions; wanted: which of these to look up at all.
    """
    ids = tl.load(table_row + keys // TOKENS, mask=wanted, other=-1)
    rows = tl.maximum(ids, 0).to(tl.int64) * block_stride + (keys % TOKENS) * DIM
    return rows, ids >= 0
