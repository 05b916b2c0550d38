"""`Checkpoint`: a model's spec and its canonical tensors, whatever file format they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors, manifest, manifest_bytes
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
    """Rows `[start, stop)` of part `part` of a tensor: what is converted at a time, by whichever thread."""

    entry: TensorEntry
    tensor: CanonicalTensor
    part: int
    start: int
    stop: int


class Checkpoint:
    """A checkpoint whose headers were read and agree with its spec; tensor data is read on demand.

    Raises CheckpointError from the constructor for a tensor that is missing or has the wrong shape.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource) -> None:
        self.spec = spec
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in canonical_tensors(spec)}
        for tensor in self._tensors.values():
            self._check(tensor)

    def weight_bytes(self, layout: WeightLayout = "canonical") -> int:
        """Bytes of the memory that holds the weights as `manifest(layout)` lays them out."""
        return manifest_bytes(self.manifest(layout))

    def manifest(self, layout: WeightLayout = "canonical") -> tuple[TensorEntry, ...]:
        """Name, dtype, shape and offset of every tensor. Reads no tensor data."""
        return manifest(self.spec, layout)

    def tensors(self, layout: WeightLayout = "canonical") -> Iterator[tuple[str, Array]]:
        """Every tensor in manifest order, each converted when it is asked for."""
        for entry in self.manifest(layout):
            out = np.zeros(entry.shape, NUMPY_DTYPES[entry.dtype])
            for piece in self._pieces(entry):
                self.write(piece, out, layout)
            yield entry.name, out

    def pieces(self, layout: WeightLayout) -> Iterator[Piece]:
        """What `write` has to be called with, once each, in any order and by any threads."""
        for entry in self.manifest(layout):
            yield from self._pieces(entry)

    def write(self, piece: Piece, out: Array, layout: WeightLayout) -> None:
        """Convert a piece to its place in `out`, the whole tensor as its entry describes it.

        out: all zero at first, C-contiguous if matrices are packed.
        """
        tensor = piece.tensor
        name = self._source.names(tensor)[piece.part]
        rows = self._source.rows(name, piece.start, piece.stop)
        if layout == "panels" and tensor.is_matrix:
            shared = tensor.shared_panels
            first = 0 if shared > 1 else _rows_before(tensor, piece.part)
            target = lanes(out, piece.part if shared > 1 else 0, shared)
            write_rows(target, first + piece.start, rows, NUMPY_DTYPES[tensor.dtype])
        else:
            first = _rows_before(tensor, piece.part)
            np.copyto(out[first + piece.start : first + piece.stop], rows, casting="unsafe")

    def _pieces(self, entry: TensorEntry) -> Iterator[Piece]:
        tensor = self._tensors[entry.name]
        for part, shape in enumerate(tensor.parts):
            step = max(PANEL, CHUNK_ELEMENTS // math.prod(shape[1:]) // PANEL * PANEL)
            for start in range(0, shape[0], step):
                yield Piece(entry, tensor, part, start, min(start + step, shape[0]))

    def _check(self, tensor: CanonicalTensor) -> None:
        for name, expected in zip(self._source.names(tensor), tensor.parts, strict=True):
            shape = self._source.shape(name)
            if shape is None:
                raise CheckpointError(name, "the checkpoint has no such tensor")
            if shape != expected:
                raise CheckpointError(
                    name, f"has shape {list(shape)}, but the configuration asks for {list(expected)}"
                )


def _rows_before(tensor: CanonicalTensor, part: int) -> int:
    """Row of the joined tensor at which `part` begins."""
    return sum(shape[0] for shape in tensor.parts[:part])
