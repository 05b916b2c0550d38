"""Root mean square norm (arXiv 1910.07467) over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


class RMSNorm:
    """Normalises in float32 whatever the input's dtype, and returns that dtype.

    Families differ in where they round: Llama and its kin round the normalised input, then scale; Gemma
    scales in float32 and rounds once (`late`). In float32 there is no difference.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype, *, late: bool) -> None:
        """weight: float32, broadcast against the input; dtype: the model's."""
        self._weight = weight if late else weight.to(dtype)
        self._eps = eps
        self._late = late

    def __call__(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self._eps)
        return (y * self._weight).to(x.dtype) if self._late else y.to(x.dtype) * self._weight
