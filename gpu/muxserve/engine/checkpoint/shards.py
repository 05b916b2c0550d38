"""safetensors files: headers checked against the file's size, rows read through a memory map.

Format: 8 bytes little-endian header length, a JSON object of `name -> {dtype, shape, data_offsets}`, data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from muxserve.engine.checkpoint.base import Array
from muxserve.engine.checkpoint.errors import CheckpointError

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place in a file. dtype is the format's name for it; start and stop are bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Shards:
    """All tensors of one or several safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, np.memmap[tuple[int], np.dtype[np.uint8]]] = {}
        for file in files:
            self._tensors.update(read_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> StoredTensor | None:
        return self._tensors.get(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `[start, stop)` of a tensor: a view of the file, in the stored dtype."""
        tensor = self._tensors[name]
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                name, f"is stored as {tensor.dtype}; supported in safetensors: {', '.join(DTYPES)}"
            )
        row = math.prod(tensor.shape[1:]) * dtype.itemsize
        data = self._map(tensor.file)[tensor.start + start * row : tensor.start + stop * row]
        return data.view(dtype).reshape(stop - start, *tensor.shape[1:])

    def _map(self, file: Path) -> np.memmap[tuple[int], np.dtype[np.uint8]]:
        if file not in self._maps:
            self._maps[file] = np.memmap(file, dtype=np.uint8, mode="r")
        return self._maps[file]


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises CheckpointError if there are none, or not all."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        others = sorted(file.name for file in directory.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, save the model as safetensors" if others else ""
        raise CheckpointError("path", f"{directory} has no model.safetensors{hint}")
    files = []
    for name in sorted(set(_weight_map(index).values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index.name}:weight_map", f"{name!r} is not the name of a file beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index.name}:weight_map", f"{name} is missing from {directory}")
        files.append(directory / name)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        document = json.loads(index.read_bytes())
        entries = document["weight_map"].items()
        return {str(name): str(file) for name, file in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(index.name, f"is not a safetensors index: {error}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of `file` lie. Raises CheckpointError if header or sizes do not fit the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(file.name, f"is truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(file.name, f"has a corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(file.name, "has a corrupt safetensors header: not an object")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(file: Path, name: str, entry: object, data: int, size: int) -> StoredTensor:
    try:
        fields = dict(entry)  # type: ignore[call-overload]
        dtype = str(fields["dtype"])
        shape = tuple(int(length) for length in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(file.name, f"has a corrupt header entry for {name}: {error!r}") from error
    if min((begin, *shape)) < 0 or end < begin:
        raise CheckpointError(file.name, f"has a corrupt header entry for {name}: negative sizes")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            file.name, f"has a corrupt header entry for {name}: {end - begin} bytes for {shape}"
        )
    if data + end > size:
        raise CheckpointError(
            file.name, f"is truncated: {name} ends at byte {data + end}, the file has {size}"
        )
    return StoredTensor(file, dtype, shape, data + begin, data + end)
