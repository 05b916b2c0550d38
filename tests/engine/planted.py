"""A CPU engine that has the logits that a test wants, so that its sampler is seen by itself.

One layer that adds nothing, and an embedding that makes token r the r-th axis: after it, row r of the wanted
logits comes out of the last matrix to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.checkpoint import Checkpoint
from muxserve.engine.checkpoint.canonical import CanonicalTensor
from muxserve.engine.messages import DecodeRow, Sampling, Step
from muxserve.engine.spec import LayerSpec, ModelSpec
from tests.engine.cpu import CpuEngine

Array = NDArray[np.generic]
Floats = NDArray[np.float32]

HIDDEN = 64
MOST_ROWS = HIDDEN - 4
"""Rows of wanted logits; the last axes are for a row with NaN."""
CONTEXT = 16
_LARGE, _HUGE = 2.0**20, 3e38


class _Tensors:
    """Arrays that are asked for by name; anything else is 0. See TensorSource."""

    def __init__(self, arrays: dict[str, Floats]) -> None:
        self._arrays = arrays
        self._shapes: dict[str, tuple[int, ...]] = {}

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        named = [(f"{tensor.name}/{i}", shape) for i, shape in enumerate(tensor.parts)]
        self._shapes.update(named)
        return tuple(name for name, _ in named)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        found = self._arrays.get(name.partition("/")[0])
        return np.zeros(self._shapes[name], np.float32)[start:stop] if found is None else found[start:stop]


def planted_checkpoint(logits: Tensor) -> Checkpoint:
    """logits: float32 `[R, V]`, R at most V and MOST_ROWS. Infinities may be anywhere; NaN in the last row,
    whose other logits are then finite."""
    wanted: Floats = logits.numpy()
    rows, vocabulary = wanted.shape
    assert rows <= min(vocabulary, MOST_ROWS)
    embed = np.zeros((vocabulary, HIDDEN), np.float32)
    head = np.zeros((vocabulary, HIDDEN), np.float32)
    # A lone axis is 4 when normalised: 3e38 becomes infinite.
    head[:, :rows] = np.clip(np.where(np.isnan(wanted), 0, wanted) / 4, -_HUGE, _HUGE).T
    embed[np.arange(rows), np.arange(rows)] = _LARGE
    if np.isnan(wanted).any():
        # infinity - infinity in its place; four equal axes are 2 each when normalised, one alone is 4.
        assert not np.isnan(wanted[:-1]).any()
        embed[rows - 1] = [*[0] * MOST_ROWS, *[_LARGE] * 4]
        bad = np.isnan(wanted[-1])
        head[:, MOST_ROWS] = bad * _HUGE
        head[:, MOST_ROWS + 1] = bad * -_HUGE
        head[:, MOST_ROWS + 2] = np.where(bad, 0, wanted[-1]) / 2
    spec = ModelSpec(
        architecture="planted",
        dtype="float32",
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        context_length=CONTEXT,
        layers=(LayerSpec(rope=None),),
        ropes=(),
        rms_eps=1e-6,
    )
    # For a lone axis among 64, the root of the mean of squares is an eighth of it.
    final_norm = np.full(HIDDEN, 0.5, np.float32)
    return Checkpoint(spec, _Tensors({"embed": embed, "lm_head": head, "final_norm": final_norm}))


class PlantedEngine(CpuEngine):
    """Its logits for a sequence whose last token is r are `logits[r]`."""

    def __init__(self, logits: Tensor, *, slots: int, threads: int = 1, variant: str = "") -> None:
        checkpoint = planted_checkpoint(logits)
        super().__init__(
            checkpoint, slots=slots, context=CONTEXT, block_bytes=256, threads=threads, variant=variant
        )
        # What is attended to is multiplied by 0, which makes nothing of it unless it is NaN.
        self.arena.data.fill(0)

    def __enter__(self) -> Self:
        return self

    def draw(
        self,
        which: Sequence[int],
        rows: Sequence[Sampling],
        positions: Sequence[int],
        tokens: Tensor | None = None,
        limits: Sequence[int] | None = None,
    ) -> Step:
        """One step: the token at `positions[i]` of the sequence in slot i, by `logits[which[i]]`.

        tokens: int32 `[len(rows), CONTEXT]`, the token table; gets `which` before the positions.
        """
        if tokens is None:
            tokens = torch.zeros(len(rows), CONTEXT, dtype=torch.int32)
        tokens[torch.arange(len(rows)), torch.tensor(positions) - 1] = torch.tensor(which, dtype=torch.int32)
        self.tables.tokens[: len(rows)] = tokens.numpy()
        batch = [
            DecodeRow(slot, position, limits[slot] if limits else CONTEXT + 1, sampling)
            for slot, (position, sampling) in enumerate(zip(positions, rows, strict=True))
        ]
        (step,) = self.decode(batch, 1)
        return step
