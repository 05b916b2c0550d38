"""Matrices in panels of rows, as the CPU engine reads them: one panel is one contiguous stream of memory.

A matrix W `[N, K]` is P = ceil(N / 32) panels. Panel p holds rows `32 p .. 32 p + 31`, zero where W has none:

    float32   [P, K, 32]      element [p, k, j]    = W[32 p + j, k]
    bfloat16  [P, K2, 32, 2]  element [p, k, j, i] = W[32 p + j, 2 k + i], with K2 = ceil(K / 2)

Either way a panel is `[words, 32]` words of 32 bits: a word holds one float32, or two neighbours of a row in
bfloat16 (what a dot-product instruction takes at once). Two matrices of one shape, gate and up, may share
panels, each with half of the lanes: panel p then holds rows `16 p .. 16 p + 15` of one, then those of the
other. numpy only; the itemsize, 2 or 4, says which dtype it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.generic]
Words = NDArray[np.uint32]

PANEL = 32
"""Lanes of a panel: rows of the matrix or, if matrices share it, of all of them together."""

_PAD_WORDS = 16
"""Words between rows while they are transposed. With a power of two between them, as many models would have
it, all rows of a panel fall into the same few sets of the cache: measured, a third of the speed."""


def packed_shape(rows: int, columns: int, itemsize: int, matrices: int = 1) -> tuple[int, ...]:
    """Shape of the packed form of `matrices` (1 or 2) matrices `[rows, columns]` that share panels."""
    panels = -(-rows // (PANEL // matrices))
    return (panels, columns, PANEL) if itemsize == 4 else (panels, -(-columns // 2), PANEL, 2)


def lanes(packed: Array, matrix: int = 0, matrices: int = 1) -> Words:
    """A view of the words of one matrix, `[panels, words of a row, PANEL / matrices]`.

    packed: C-contiguous, of `packed_shape`.
    """
    width = PANEL // matrices
    words: Words = packed.view(np.uint32).reshape(*packed.shape[:2], PANEL)
    return words[:, :, matrix * width : (matrix + 1) * width]


def write_rows(target: Words, start: int, rows: Array, dtype: DTypeLike) -> None:
    """Write `rows` `[n, K]`, converted to `dtype` (2 or 4 bytes), as rows `[start, start + n)` of a matrix.

    target: its `lanes`. Rows of different calls share no byte, so threads may write them at once.
    """
    words = _words(rows, np.dtype(dtype))
    width = target.shape[2]
    at = 0
    while at < len(words):
        panel, lane = divmod(start + at, width)
        count = min(width - lane, len(words) - at)
        np.copyto(target[panel, :, lane : lane + count], words[at : at + count].T)
        at += count


def unpack(packed: Array, rows: int, columns: int, matrices: int = 1) -> Array:
    """The matrices that `packed` holds, one below the other: `[matrices * rows, columns]` of its dtype."""
    parts = []
    for matrix in range(matrices):
        words = np.ascontiguousarray(lanes(packed, matrix, matrices).transpose(0, 2, 1))
        flat = words.reshape(-1, words.shape[2]).view(packed.dtype)
        parts.append(flat[:rows, :columns])
    return np.concatenate(parts)


def _words(rows: Array, dtype: np.dtype[np.generic]) -> Words:
    """`[n, words of a row]`: `rows` converted, an odd bfloat16 column completed by zero."""
    count, columns = rows.shape
    words = -(-columns * dtype.itemsize // 4)
    scratch = np.empty((count, words + _PAD_WORDS), np.uint32)
    np.copyto(scratch.view(dtype)[:, :columns], rows, casting="unsafe")
    if columns * dtype.itemsize % 4:
        scratch.view(dtype)[:, columns] = 0
    return scratch[:, :words]
