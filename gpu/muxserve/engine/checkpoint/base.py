"""`Checkpoint`: a model's spec and its canonical tensors, whatever file format they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors, manifest, manifest_bytes
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.messages import TensorEntry
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


class Checkpoint:
    """A checkpoint whose headers were read and agree with its spec; tensor data is read on demand.

    Raises CheckpointError from the constructor for a tensor that is missing or has the wrong shape.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource) -> None:
        self.spec = spec
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in canonical_tensors(spec)}
        self._manifest = manifest(spec)
        for tensor in self._tensors.values():
            self._check(tensor)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the memory that holds the weights as `manifest()` lays them out."""
        return manifest_bytes(self._manifest)

    def manifest(self) -> tuple[TensorEntry, ...]:
        """Name, dtype, shape and offset of every canonical tensor. Reads no tensor data."""
        return self._manifest

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every canonical tensor in manifest order, each converted when it is asked for."""
        for entry in self._manifest:
            out = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
            self.read_into(entry.name, out)
            yield entry.name, out

    def read_into(self, name: str, out: Array) -> None:
        """Write the canonical tensor `name` to `out` (its shape, any floating dtype), chunk by chunk."""
        tensor = self._tensors[name]
        first = 0
        for source, shape in zip(self._source.names(tensor), tensor.parts, strict=True):
            step = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                rows = self._source.rows(source, start, stop)
                np.copyto(out[first + start : first + stop], rows, casting="unsafe")
            first += shape[0]

    def _check(self, tensor: CanonicalTensor) -> None:
        for name, expected in zip(self._source.names(tensor), tensor.parts, strict=True):
            shape = self._source.shape(name)
            if shape is None:
                raise CheckpointError(name, "the checkpoint has no such tensor")
            if shape != expected:
                raise CheckpointError(
                    name, f"has shape {list(shape)}, but the configuration asks for {list(expected)}"
                )
