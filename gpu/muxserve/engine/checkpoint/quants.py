"""Quantised GGUF rows → float32.

Block layouts are ggml's. The three formats that small models come in are unpacked here, straight into one
output; the others by the gguf package, which is several times slower.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_any
from numpy.typing import NDArray

from muxserve.engine.checkpoint.base import NUMPY_DTYPES, Array

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

PLAIN: dict[GGMLQuantizationType, np.dtype[np.generic]] = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: NUMPY_DTYPES["bfloat16"],
}

QUANTISED = tuple(
    GGMLQuantizationType[name]
    for name in (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)

SUPPORTED = (*PLAIN, *QUANTISED)


def to_float(rows: Bytes, kind: GGMLQuantizationType) -> Array:
    """`rows`, uint8 `[n, bytes of a row]`, contiguous → `[n, columns]`, float32 or as stored if PLAIN."""
    if kind in PLAIN:
        return rows.view(PLAIN[kind])
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rows.reshape(-1, block_bytes)
    if kind == GGMLQuantizationType.Q8_0:
        out = _q8_0(blocks)
    elif kind == GGMLQuantizationType.Q4_0:
        out = _q4_0(blocks)
    elif kind == GGMLQuantizationType.Q4_1:
        out = _q4_1(blocks)
    else:
        out = cast(Floats, dequantize_any(rows, kind))
    return out.reshape(len(rows), rows.shape[1] // block_bytes * block)


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start` of every block, `[blocks, 1]`."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """scale (float16), 32 int8."""
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    out *= _half(blocks, 0)
    return out


def _nibbles(packed: Bytes) -> Floats:
    """`[blocks, 16]` → `[blocks, 32]`: the low halves of the bytes, then the high halves."""
    out = np.empty((len(packed), 32), np.float32)
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    return out


def _q4_0(blocks: Bytes) -> Floats:
    """scale (float16), 32 four-bit numbers with offset 8."""
    out = _nibbles(blocks[:, 2:])
    out -= np.float32(8)
    out *= _half(blocks, 0)
    return out


def _q4_1(blocks: Bytes) -> Floats:
    """scale and minimum (float16), 32 four-bit numbers."""
    out = _nibbles(blocks[:, 4:])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)
    return out
