"""Quantised GGUF rows → float32.

Block layouts are ggml's. The formats that most files are made of are unpacked here, eight numbers at a time;
the others by the gguf package, which takes five to ten times as long. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_any
from numpy.typing import NDArray

from muxserve.engine.checkpoint.base import NUMPY_DTYPES, Array

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint64]

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
    unpack = _UNPACK.get(kind.name)
    out = cast(Floats, dequantize_any(rows, kind)) if unpack is None else unpack(blocks)
    return out.reshape(len(rows), rows.shape[1] // block_bytes * block)


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte `start`, an even one, of every block, `[blocks, 1]`."""
    halves = blocks.view(np.float16)
    return halves[:, start // 2 : start // 2 + 1].astype(np.float32)


def _every(byte: int) -> np.uint64:
    """Eight times the same byte: numbers are unpacked from words of eight bytes, eight at a time."""
    return np.uint64(byte * 0x0101010101010101)


def _words(blocks: Bytes, start: int, stop: int) -> Words:
    """Bytes `[start, stop)` of every block, `[blocks, (stop - start) / 8]`."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.uint64)


def _nibbles(words: Words, group: int) -> Words:
    """Of every `group` words the low halves of the bytes, then the high halves: twice as many words."""
    words = words.reshape(len(words), -1, 1, group)
    out = np.empty((len(words), words.shape[1], 2, group), np.uint64)
    np.bitwise_and(words, _every(0x0F), out=out[:, :, :1])
    np.bitwise_and(words >> 4, _every(0x0F), out=out[:, :, 1:])
    return out.reshape(len(words), -1)


def _fifth_bits(blocks: Bytes, start: int) -> Words:
    """Bit i of the uint32 at byte `start` as bit 4 of byte i: `[blocks, 4]`."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    words: Words = bits.view(np.uint64)
    return words << np.uint64(4)


def _shifted(words: Words, shifts: Sequence[int], mask: int) -> Words:
    """`words` `[blocks, groups, n]` → `[blocks, groups, shifts, n]`, masked and put at bit 4."""
    out = words[:, :, None, :] >> np.array(shifts, np.uint64)[:, None]
    out &= _every(mask)
    out <<= np.uint64(4)
    return out


def _floats(words: Words, scales: int, offset: int = 0) -> Floats:
    """The bytes of `words`, less `offset`, as `[blocks, scales, numbers of one scale]`."""
    numbers = words.view(np.uint8).reshape(len(words), scales, -1)
    if offset:
        numbers -= np.uint8(offset)
        return numbers.view(np.int8).astype(np.float32)
    return numbers.astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """scale (float16), 32 int8."""
    out = blocks[:, 2:].view(np.int8).astype(np.float32)
    out *= _half(blocks, 0)
    return out


def _q4_0(blocks: Bytes) -> Floats:
    """scale (float16), 32 four-bit numbers with offset 8."""
    out = _floats(_nibbles(_words(blocks, 2, 18), 2), 1, offset=8)
    out *= _half(blocks, 0)[:, :, None]
    return out


def _q4_1(blocks: Bytes) -> Floats:
    """scale and minimum (float16), 32 four-bit numbers."""
    out = _floats(_nibbles(_words(blocks, 4, 20), 2), 1)
    out *= _half(blocks, 0)[:, :, None]
    out += _half(blocks, 2)[:, :, None]
    return out


def _q5_0(blocks: Bytes) -> Floats:
    """scale (float16), fifth bits (uint32), 32 times four bits, offset 16."""
    numbers = _nibbles(_words(blocks, 6, 22), 2) | _fifth_bits(blocks, 2)
    out = _floats(numbers, 1, offset=16)
    out *= _half(blocks, 0)[:, :, None]
    return out


def _q5_1(blocks: Bytes) -> Floats:
    """scale and minimum (float16), fifth bits (uint32), 32 times four bits."""
    out = _floats(_nibbles(_words(blocks, 8, 24), 2) | _fifth_bits(blocks, 4), 1)
    out *= _half(blocks, 0)[:, :, None]
    out += _half(blocks, 2)[:, :, None]
    return out


def _scaled(blocks: Bytes, numbers: Words) -> Floats:
    """Q4_K, Q5_K: eight scales and minima for `numbers`, six bits each in bytes 4 to 16, behind a float16
    that multiplies the scales and one that multiplies the minima."""
    first, second, both = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.hstack([first & 63, (both & 15) | ((first >> 2) & 48)])
    minima = np.hstack([second & 63, (both >> 4) | ((second >> 2) & 48)])
    out = _floats(numbers, 8)
    out *= (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    out -= (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return out


def _q4_k(blocks: Bytes) -> Floats:
    """Scales and minima in 16 bytes, 256 times four bits."""
    return _scaled(blocks, _nibbles(_words(blocks, 16, 144), 4))


def _q5_k(blocks: Bytes) -> Floats:
    """Scales and minima in 16 bytes, fifth bits (bit s of byte i: number i of scale s), 256 × four bits."""
    fifth = _shifted(_words(blocks, 16, 48)[:, None, :], range(8), 1)
    return _scaled(blocks, _nibbles(_words(blocks, 48, 176), 4) | fifth.reshape(len(blocks), -1))


def _q6_k(blocks: Bytes) -> Floats:
    """256 times four low bits, two high bits of each, 16 scales (int8), a scale of the scales (float16)."""
    high = _shifted(_words(blocks, 128, 192).reshape(len(blocks), 2, 4), (0, 2, 4, 6), 3)
    out = _floats(_nibbles(_words(blocks, 0, 128), 8) | high.reshape(len(blocks), -1), 16, offset=32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    out *= (_half(blocks, 208) * scales)[:, :, None]
    return out


_UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
