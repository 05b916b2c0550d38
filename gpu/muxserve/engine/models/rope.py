"""Rotary position embedding, half-split form (RoFormer, arXiv 2104.09864; rounding as in transformers)."""

from __future__ import annotations

import torch
from torch import Tensor

from muxserve.engine.spec import RopeSpec


class Rope:
    """One set of frequencies.

    Angles are computed per batch, once for all layers that share them: that costs less than a layer's
    smallest operation, and a table for a long context would cost memory in every executor.
    """

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        self._frequencies = torch.tensor(spec.inverse_frequencies, dtype=torch.float32, device=device)
        self._attention_factor = spec.attention_factor

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` int64 `[N]`, `[N, 1, rotary_dim / 2]` of `dtype`."""
        angle = positions.float()[:, None] * self._frequencies
        cos, sin = angle.cos(), angle.sin()
        if self._attention_factor != 1.0:
            cos, sin = cos * self._attention_factor, sin * self._attention_factor
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading `2 * cos.shape[-1]` dimensions of `heads` `[N, heads, head_dim]`; a new tensor."""
    half = cos.shape[-1]
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    # Products round to the model's dtype before the sum does, as in transformers.
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if 2 * half < heads.shape[-1]:
        out[..., 2 * half :] = heads[..., 2 * half :]
    return out
