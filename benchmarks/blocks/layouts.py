"""`Placed`: sequences' KV in an arena, cut into blocks of one size or lying in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.arena import ALIGNMENT
from muxserve.engine.spec import KVLayout

Array = NDArray[Any]

CONTIGUOUS = "contiguous"
"""All tokens of a sequence's KV head in one block: K of all of them, then V."""

IN_ORDER = "16 KiB in order"
"""Blocks of that size, but those of a head one after another in memory: what scattering alone costs."""

SIZES = {"4 KiB": 4096, "8 KiB": 8192, "16 KiB": 16384, "32 KiB": 32768}
LAYOUTS = (CONTIGUOUS, *SIZES, IN_ORDER)


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one model, bfloat16. lengths: tokens of each sequence."""

    layers: int
    kv_heads: int
    head_dim: int
    group: int
    """Query heads of one KV head."""
    lengths: tuple[int, ...]

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def kv_bytes(self) -> int:
        """Of all sequences, in one layer."""
        return sum(self.lengths) * self.kv_heads * self.head_dim * 2 * 2


@dataclass(frozen=True, slots=True)
class Placed:
    """A table (int32 `[layers, sequences, kv_heads, spans]`) and the size of its blocks; slot = sequence."""

    layout: KVLayout
    table: Array


def place(name: str, shape: Shape, arena_bytes: int, seed: int) -> Placed:
    """`shape`'s sequences under the layout of that name, in an arena of that many bytes.

    Raises ValueError if they do not fit.
    """
    longest = max(shape.lengths)
    if name == CONTIGUOUS:
        size = -(-longest * shape.head_dim * 4 // ALIGNMENT) * ALIGNMENT
    else:
        size = SIZES[name.removesuffix(" in order")]
    layout = KVLayout(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype="bfloat16",
        block_bytes=size,
    )
    table = np.full(
        (shape.layers, len(shape.lengths), shape.kv_heads, layout.spans(longest)), -1, dtype=np.int32
    )
    held = np.zeros(table.shape, dtype=bool)
    for slot, length in enumerate(shape.lengths):
        held[:, slot, :, : layout.spans(length)] = True
    wanted, blocks = int(held.sum()), arena_bytes // size
    if wanted > blocks:
        raise ValueError(f"{wanted} blocks of {size} bytes do not fit {arena_bytes} bytes")
    ids = np.arange(blocks, dtype=np.int32)
    if name != IN_ORDER:
        np.random.default_rng(seed).shuffle(ids)
    table[held] = ids[:wanted]  # in the order of the table: spans of a head one after another
    return Placed(layout, table)


def fill(arena: Array) -> None:
    """Make all of `arena` (uint8) random bfloat16 numbers of the standard normal distribution."""
    numbers = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)
    piece = np.ascontiguousarray(numbers.view(np.uint16)[1::2]).view(np.uint8)
    for begin in range(0, len(arena), len(piece)):
        part = arena[begin : begin + len(piece)]
        part[:] = piece[: len(part)]
