"""`Cell`: attention over certain sequences whose KV lies in a certain way; and all that are measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import LLAMA_2_7B, LLAMA_3_8B, TINY_SHAPES, Shape
from muxserve.engine.spec import ITEMSIZE, KVLayout

KIB = 1024
Order = Literal["scattered", "in order", "one block"]
BLOCK = 16 * KIB
"""What a worker has unless told otherwise."""
SIZES = (4 * KIB, 8 * KIB, 32 * KIB)
"""Studied beside it, for a few shapes."""


@dataclass(frozen=True)
class Cell:
    """Sequences of (history, new) tokens each. Decode is one new token each."""

    shape: Shape
    pieces: tuple[tuple[int, int], ...]
    order: Order = "scattered"
    block_bytes: int = BLOCK

    @property
    def longest(self) -> int:
        return max(history + new for history, new in self.pieces)

    @property
    def decode(self) -> bool:
        return all(new == 1 for _, new in self.pieces)

    @property
    def kv_bytes(self) -> int:
        """Of one layer."""
        tokens = sum(history + new for history, new in self.pieces)
        return tokens * self.shape.kv_bytes_per_token // self.shape.layers

    @property
    def flop(self) -> int:
        """Of one layer."""
        return sum(self.shape.attention_flop(h, h + n) for h, n in self.pieces) // self.shape.layers

    @property
    def layout(self) -> KVLayout:
        if self.order != "one block":
            return self.shape.layout(self.block_bytes)
        token = 2 * self.shape.head_dim * ITEMSIZE[self.shape.dtype]
        return self.shape.layout(self.longest * token)

    @property
    def name(self) -> str:
        if self.order == "one block":
            return "contiguous"
        return f"{self.block_bytes // KIB} KiB" + (" in order" if self.order == "in order" else "")

    @property
    def title(self) -> str:
        count, (history, new) = len(self.pieces), self.pieces[0]
        how = f"{history + new:,}" if new == 1 else f"{new:,} after {history:,}"
        return f"{self.shape.name}, {count} x {how}"


def decode_cells(context: Context) -> Iterator[tuple[Cell, ...]]:
    """Layouts of one shape, batch and context. Qwen3-4B's attention is Llama-3-8B's."""
    if context.tiny:
        yield _layouts(TINY_SHAPES[0], ((22, 1), (0, 1)), 4 * KIB)
        return
    studied = [
        (LLAMA_3_8B, 32, 2048),
        (LLAMA_3_8B, 32, 8192),
        (LLAMA_3_8B, 128, 2048),
        (LLAMA_2_7B, 32, 2048),
    ]
    others = itertools.product((LLAMA_3_8B, LLAMA_2_7B), (1, 8, 32, 128), (512, 2048, 8192))
    for shape, batch, length in dict.fromkeys((*studied, *others)):  # what counts most comes first
        sizes = SIZES if (shape, batch, length) in studied else ()
        yield _layouts(shape, ((length - 1, 1),) * batch, BLOCK, sizes)


def prefill_cells(context: Context) -> Iterator[tuple[Cell, ...]]:
    """No history first: that torch can do too."""
    if context.tiny:
        yield _layouts(TINY_SHAPES[0], ((0, 9), (0, 9)), 4 * KIB)
        yield _layouts(TINY_SHAPES[1], ((20, 5),), 4 * KIB)
        return
    for shape in (LLAMA_3_8B, LLAMA_2_7B):
        for pieces in (((0, 2048),) * 4, ((0, 8192),), ((0, 512),) * 16, ((6144, 2048),), ((1920, 128),) * 8):
            yield _layouts(shape, pieces, BLOCK)


def _layouts(
    shape: Shape, pieces: tuple[tuple[int, int], ...], block: int, others: tuple[int, ...] = ()
) -> tuple[Cell, ...]:
    return (
        Cell(shape, pieces, "scattered", block),
        Cell(shape, pieces, "one block", block),
        Cell(shape, pieces, "in order", block),
        *(Cell(shape, pieces, "scattered", size) for size in others),
    )
