"""Reads the key-value part of a GGUF file: tokenizer and chat template are in it. Tensors are not touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path

Value = int | float | bool | str | list["Value"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 26


class BrokenGGUFError(ValueError):
    """The file is not GGUF, is of a version this reader does not know, or ends too early."""


class _Cursor:
    """A position in the file's bytes. Reading past the end raises BrokenGGUFError."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    def unpack(self, form: str, count: int = 1) -> tuple[int | float | bool, ...]:
        form = f"<{count}{form}"
        start = self._advance(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)

    def integer(self, form: str) -> int:
        return int(self.unpack(form)[0])

    def text(self) -> str:
        length = self.integer("Q")
        start = self._advance(length)
        return self._data[start : start + length].decode("utf-8", "replace")

    def _advance(self, size: int) -> int:
        start = self._at
        if size > self._size - start:
            raise BrokenGGUFError(
                f"truncated: {size} bytes wanted at offset {start}, the file has {self._size}"
            )
        self._at = start + size
        return start


def read_metadata(path: Path, wanted: Callable[[str], bool] = lambda _key: True) -> dict[str, Value]:
    """The entries whose key is `wanted`. Raises BrokenGGUFError, or OSError if the file cannot be read."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BrokenGGUFError("not a GGUF file: the first four bytes are not 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.integer("I")
            if (version := cursor.integer("I")) not in (2, 3):
                raise BrokenGGUFError(f"GGUF version {version} is not supported (2 and 3 are)")
            cursor.integer("Q")
            entries = {}
            for _ in range(_checked(cursor.integer("Q"))):
                key = cursor.text()
                value = _value(cursor, cursor.integer("I"))
                if wanted(key):
                    entries[key] = value
            return entries


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind])[0]
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise BrokenGGUFError(f"unknown value type {kind}")
    item = cursor.integer("I")
    count = _checked(cursor.integer("Q"))
    if item in _SCALARS:
        return list(cursor.unpack(_SCALARS[item], count))
    return [_value(cursor, item) for _ in range(count)]


def _checked(count: int) -> int:
    if count > _MAX_ENTRIES:
        raise BrokenGGUFError(f"{count} entries cannot be right")
    return count
