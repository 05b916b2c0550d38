"""Triton's interpreter, mended. Imported where TRITON_INTERPRET is set and nowhere else.

The interpreter (of Triton 3.6 and 3.7) works on numpy arrays and has three faults that matter here: numpy
2.4 refuses its one-element arrays as the bounds of a range; bfloat16, which numpy does not know and which
it keeps as uint16, is multiplied as integers in `tl.dot`; and float32 is truncated to bfloat16, or, asked
to round, loses a carry. GPUs do none of that, so kernels are not written around it.
"""

# mypy: allow-untyped-calls, disable-error-code="method-assign"
from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_original_patch = interpreter._patch_lang_tensor
_original_dot = interpreter.InterpreterBuilder.create_dot
_original_cast = interpreter.InterpreterBuilder.cast_impl


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _to_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _original_dot(self, _to_float32(a), _to_float32(b), *rest)


def _cast_impl(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return _to_float32(source)
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _original_cast(self, source, to)
    bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), to.scalar)


def mend() -> None:
    """Put this right for every kernel that this process interprets."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
