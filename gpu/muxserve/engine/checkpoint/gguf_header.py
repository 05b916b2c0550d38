"""The header of a GGUF file, checked against the file's size, without reading tensor data.

Format (versions 2 and 3, little-endian): magic, version, tensor count, metadata count, metadata entries (key,
type, value), tensor entries (name, dimensions innermost first, type, offset), padding, data. Arrays (the
vocabulary) are stepped over and decoded only when asked for, so that a header is read in milliseconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from muxserve.engine.checkpoint.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct codes of the scalar value types."""

MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape is outermost first; start and stop are bytes of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array in the metadata that was stepped over. offset: byte of its first item."""

    kind: int
    count: int
    offset: int


class GGUFHeader:
    """metadata: scalars and strings by key, arrays as GGUFArray. tensors: by name.

    Raises CheckpointError if the file is not a GGUF, is truncated, or holds what we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                hint = "; safetensors are named by their directory" if path.suffix == ".safetensors" else ""
                raise CheckpointError("path", f"{path} is not a GGUF file{hint}")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = len(MAGIC)
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read()
        except (struct.error, UnicodeDecodeError) as error:
            raise self._broken(f"its header breaks off or is corrupt at byte {self._at}") from error

    def array(self, key: str) -> list[object] | None:
        """The items of an array of the metadata; None if there is no such key, or it is not an array."""
        value = self.metadata.get(key)
        if not isinstance(value, GGUFArray):
            return None
        self._at = value.offset
        return [self._value(value.kind) for _ in range(value.count)]

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError("path", f"{self.path} is truncated or corrupt: {reason}")

    def _read(self) -> None:
        version = int(self._scalar("I"))
        if version not in VERSIONS:
            known = " and ".join(str(known) for known in VERSIONS)
            raise CheckpointError("path", f"{self.path} has GGUF version {version}; {known} are supported")
        tensors, entries = int(self._scalar("Q")), int(self._scalar("Q"))
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(int(self._scalar("I")))
        places = [self._tensor_entry() for _ in range(self._counted(tensors, 24))]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError("general.alignment", f"must be a positive integer, got {alignment!r}")
        data = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in places:
            self.tensors[name] = self._place(name, shape, kind, data + offset)

    def _scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + code, self.data, self._at)
        self._at += struct.calcsize("<" + code)
        return value  # type: ignore[no-any-return]

    def _counted(self, count: int, item_bytes: int) -> int:
        """`count`, if as many items can lie in the rest of the file: a corrupt count must not cost memory."""
        if count * item_bytes > self._size - self._at:
            raise self._broken(f"{count} items are announced at byte {self._at} of {self._size}")
        return count

    def _string(self) -> str:
        length = self._counted(int(self._scalar("Q")), 1)
        start, self._at = self._at, self._at + length
        return self.data[start : self._at].decode()

    def _value(self, kind: int) -> object:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._skip_array()
        if kind not in SCALARS:
            raise self._broken(f"unknown metadata type {kind} at byte {self._at}")
        return self._scalar(SCALARS[kind])

    def _skip_array(self) -> GGUFArray:
        kind, count = int(self._scalar("I")), int(self._scalar("Q"))
        if kind in SCALARS:
            size = struct.calcsize("<" + SCALARS[kind])
            array = GGUFArray(kind, self._counted(count, size), self._at)
            self._at += count * size
        elif kind == STRING:
            array = GGUFArray(kind, self._counted(count, 8), self._at)
            self._at = self._after_strings(self._at, count)
        else:
            raise self._broken(f"an array of type {kind} at byte {self._at}")
        if self._at > self._size:
            raise self._broken(f"an array reaches byte {self._at} of {self._size}")
        return array

    def _after_strings(self, at: int, count: int) -> int:
        # The one hot loop: a vocabulary has hundreds of thousands of strings.
        data, length_at = self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length_at(data, at)[0]
        return at

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = int(self._scalar("I"))
        if dimensions > MAX_DIMENSIONS:
            raise self._broken(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(int(self._scalar("Q")) for _ in range(dimensions))
        return name, shape[::-1], int(self._scalar("I")), int(self._scalar("Q"))

    def _place(self, name: str, shape: tuple[int, ...], kind_id: int, start: int) -> GGUFTensor:
        try:
            kind = GGMLQuantizationType(kind_id)
        except ValueError:
            raise CheckpointError(name, f"has the unknown quantisation type {kind_id}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(name, f"has rows of {shape[-1:]}, not a multiple of {kind.name}'s {block}")
        stop = start + math.prod(shape) // block * block_bytes
        if stop > self._size:
            raise CheckpointError(
                "path",
                f"{self.path} is truncated: tensor {name} ends at byte {stop}, the file has {self._size}",
            )
        return GGUFTensor(name, shape, kind, start, stop)
