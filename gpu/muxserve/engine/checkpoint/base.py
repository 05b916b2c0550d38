"""`Checkpoint`: a model's spec and its canonical tensors, whatever file format they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors, lay_out, manifest_bytes
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.messages import TensorEntry, WeightLayout
from muxserve.engine.packing import PANEL, lanes, write_rows
from muxserve.engine.spec import ModelSpec

Array = NDArray[np.generic]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

CHUNK_ELEMENTS = 1 << 18
"""Elements converted at a time: a float32 chunk of 1 MiB stays in a core's cache."""


class TensorSource(Protocol):
    """The tensors of one file format, found by the canonical tensor they belong to."""

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        """Names in the file of the tensor's parts, in the order of `tensor.parts`."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor in the file, from its header; None if the file has none of that name."""

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `[start, stop)` (axis 0) in canonical order and value, in any floating dtype."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows, or panels if it is packed, `[start, stop)` of a tensor: one stretch of memory."""

    entry: TensorEntry
    layout: WeightLayout
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """Byte at which the piece lies in the model's weight memory."""
        row = math.prod(self.entry.shape[1:]) * NUMPY_DTYPES[self.entry.dtype].itemsize
        return self.entry.offset + self.start * row


class Checkpoint:
    """A checkpoint whose headers were read and agree with its spec; tensor data is read on demand.

    tensors: None = those of the spec. Raises CheckpointError from the constructor for a tensor that is
    missing or has the wrong shape.
    """

    def __init__(
        self, spec: ModelSpec, source: TensorSource, tensors: Iterable[CanonicalTensor] | None = None
    ) -> None:
        self.spec = spec
        self.source = source
        wanted = canonical_tensors(spec) if tensors is None else tensors
        self._tensors = {tensor.name: tensor for tensor in wanted}
        for tensor in self._tensors.values():
            self._check(tensor)

    def weight_bytes(self, layout: WeightLayout = "canonical") -> int:
        """Bytes of the memory that holds the weights as `manifest(layout)` lays them out."""
        return manifest_bytes(self.manifest(layout))

    def manifest(self, layout: WeightLayout = "canonical") -> tuple[TensorEntry, ...]:
        """Name, dtype, shape and offset of every tensor. Reads no tensor data."""
        return lay_out(self._tensors.values(), layout)

    def tensors(self, layout: WeightLayout = "canonical") -> Iterator[tuple[str, Array]]:
        """Every tensor in manifest order, each converted when it is asked for."""
        for entry in self.manifest(layout):
            yield entry.name, np.concatenate([self.read(piece) for piece in _cut(entry, layout)])

    def pieces(self, layout: WeightLayout) -> Iterator[Piece]:
        """All that there is to `read`, in the order of memory."""
        for entry in self.manifest(layout):
            yield from _cut(entry, layout)

    def read(self, piece: Piece) -> Array:
        """Convert a piece: `[stop - start, …]` as its entry says, C-contiguous. Threads may do so at once."""
        entry, tensor = piece.entry, self._tensors[piece.entry.name]
        dtype = NUMPY_DTYPES[entry.dtype]
        out = np.zeros((piece.stop - piece.start, *entry.shape[1:]), dtype)
        if piece.layout == "canonical" or not tensor.is_matrix:
            for at, rows in self._rows(tensor, piece.start, piece.stop):
                np.copyto(out[at : at + len(rows)], rows, casting="unsafe")
        elif tensor.shared_panels == 1:
            for at, rows in self._rows(tensor, piece.start * PANEL, piece.stop * PANEL):
                write_rows(lanes(out), at, rows, dtype)
        else:
            width = PANEL // tensor.shared_panels
            for part, (count, _) in enumerate(tensor.parts):
                name = self.source.names(tensor)[part]
                rows = self.source.rows(name, piece.start * width, min(piece.stop * width, count))
                write_rows(lanes(out, part, tensor.shared_panels), 0, rows, dtype)
        return out

    def _rows(self, tensor: CanonicalTensor, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Rows `[start, stop)` of the joined tensor, part by part, each with its distance from `start`."""
        first = 0
        for name, (count, *_) in zip(self.source.names(tensor), tensor.parts, strict=True):
            begin, end = max(start, first), min(stop, first + count)
            if begin < end:
                yield begin - start, self.source.rows(name, begin - first, end - first)
            first += count

    def _check(self, tensor: CanonicalTensor) -> None:
        for name, expected in zip(self.source.names(tensor), tensor.parts, strict=True):
            shape = self.source.shape(name)
            if shape is None:
                raise CheckpointError(name, "the checkpoint has no such tensor")
            if shape != expected:
                raise CheckpointError(
                    name, f"has shape {list(shape)}, but the configuration asks for {list(expected)}"
                )


def _cut(entry: TensorEntry, layout: WeightLayout) -> Iterator[Piece]:
    step = max(1, CHUNK_ELEMENTS // math.prod(entry.shape[1:]))
    for start in range(0, entry.shape[0], step):
        yield Piece(entry, layout, start, min(start + step, entry.shape[0]))
