"""Packed matrices: every element where the CPU engine looks for it, and zero where there is none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from muxserve.engine.packing import PANEL, lanes, packed_shape, unpack, write_rows

DTYPES = (np.dtype(np.uint16), np.dtype(np.float32))
"""uint16 stands for bfloat16: bits that are moved, never computed with."""

Matrix = NDArray[np.generic]


def matrix(rows: int, columns: int, dtype: np.dtype[np.generic], seed: int = 0) -> Matrix:
    """Every element is another one, and none is zero."""
    values = np.random.default_rng(seed).permutation(rows * columns) + 1
    return values.reshape(rows, columns).astype(dtype)


def pack(parts: list[Matrix], cuts: list[int]) -> Matrix:
    """Written in pieces `[cut, next cut)`, the last piece first."""
    rows, columns = parts[0].shape
    packed = np.zeros(packed_shape(rows, columns, parts[0].itemsize, len(parts)), parts[0].dtype)
    borders = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for index, part in enumerate(parts):
        for start, stop in reversed(list(itertools.pairwise(borders))):
            write_rows(lanes(packed, index, len(parts)), start, part[start:stop], part.dtype)
    return packed


shapes = {
    "rows": st.integers(1, 3 * PANEL + 1),
    "columns": st.integers(1, 40),
    "dtype": st.sampled_from(DTYPES),
    "matrices": st.sampled_from((1, 2)),
    "cuts": st.lists(st.integers(1, 3 * PANEL), max_size=4),
}


@given(**shapes)
@settings(max_examples=200, deadline=None)
def test_what_is_packed_in_pieces_is_unpacked_whole(
    rows: int, columns: int, dtype: np.dtype[np.generic], matrices: int, cuts: list[int]
) -> None:
    parts = [matrix(rows, columns, dtype, seed) for seed in range(matrices)]
    packed = pack(parts, cuts)
    np.testing.assert_array_equal(unpack(packed, rows, columns, matrices), np.concatenate(parts))
    # Every element is there once, so all else is zero.
    assert np.count_nonzero(packed) == matrices * rows * columns


@given(**shapes)
@settings(max_examples=100, deadline=None)
def test_elements_lie_where_the_formula_says(
    rows: int, columns: int, dtype: np.dtype[np.generic], matrices: int, cuts: list[int]
) -> None:
    parts = [matrix(rows, columns, dtype, seed) for seed in range(matrices)]
    packed = pack(parts, cuts)
    width = PANEL // matrices
    for index, part in enumerate(parts):
        for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
            panel, lane = divmod(row, width)
            lane += index * width
            if dtype.itemsize == 4:
                assert packed[panel, column, lane] == part[row, column]
            else:
                assert packed[panel, column // 2, lane, column % 2] == part[row, column]


@pytest.mark.parametrize(
    ("itemsize", "matrices", "shape"),
    [(4, 1, (3, 7, 32)), (2, 1, (3, 4, 32, 2)), (4, 2, (5, 7, 32)), (2, 2, (5, 4, 32, 2))],
)
def test_shapes(itemsize: int, matrices: int, shape: tuple[int, ...]) -> None:
    assert packed_shape(65, 7, itemsize, matrices) == shape


def test_rows_of_other_dtypes_are_converted() -> None:
    rows = np.array([[1.5, -2.0, 3.25]], np.float64)
    packed = np.zeros(packed_shape(1, 3, 4), np.float32)
    write_rows(lanes(packed), 0, rows, np.float32)
    np.testing.assert_array_equal(unpack(packed, 1, 3), rows)
