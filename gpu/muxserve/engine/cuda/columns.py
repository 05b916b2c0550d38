"""What the host tells the device for a pass: columns with an entry for each row, and tables of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.cuda.device import Device, Event
from muxserve.engine.cuda.lanes import Lane

_ALIGNMENT = 16
_TURNS = 2
"""Host buffers: one is filled while the other may still be read by a copy."""


class _Staged:
    """Device memory, and pinned host memory to fill it from. Uploads take their place in the lane's work."""

    def __init__(self, device: Device, size: int) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8, device=device.torch)
        self._pinned = [device.pinned(size).zero_() for _ in range(_TURNS)]
        self._copied: list[Event | None] = [None] * _TURNS
        self._device = device
        self._turn = 0

    def host(self) -> Tensor:
        """To be filled before the next `upload`."""
        self._turn = (self._turn + 1) % _TURNS
        if (copied := self._copied[self._turn]) is not None:
            copied.wait()
        return self._pinned[self._turn]

    def upload(self, lane: Lane, size: int) -> None:
        """Begin to copy the first `size` bytes."""
        with self._device.on(lane):
            self.memory[:size].copy_(self._pinned[self._turn][:size], non_blocking=True)
        event = self._copied[self._turn] = self._copied[self._turn] or self._device.event()
        event.record(lane)


class Columns:
    """Named columns, one after another in one piece of memory, so that one copy takes them all."""

    def __init__(self, device: Device, columns: Mapping[str, tuple[torch.dtype, int]]) -> None:
        """columns: dtype and number of elements of each."""
        self._places: dict[str, tuple[torch.dtype, slice]] = {}
        self._size = 0
        for name, (dtype, count) in columns.items():
            begin = -(-self._size // _ALIGNMENT) * _ALIGNMENT
            self._size = begin + count * dtype.itemsize
            self._places[name] = (dtype, slice(begin, self._size))
        self._staged = _Staged(device, self._size)
        self._views = self._over(self._staged.memory)

    def __getitem__(self, name: str) -> Tensor:
        """The column on the device."""
        return self._views[name]

    def host(self) -> dict[str, NDArray[Any]]:
        """The columns to fill before the next `upload`; what is in them is from some time before."""
        return {name: column.numpy() for name, column in self._over(self._staged.host()).items()}

    def upload(self, lane: Lane) -> None:
        """Begin to copy what was filled in."""
        self._staged.upload(lane, self._size)

    def _over(self, memory: Tensor) -> dict[str, Tensor]:
        return {name: memory[place].view(dtype) for name, (dtype, place) in self._places.items()}


class Rectangle:
    """An int32 array on the device that has another shape each time, always at the same address, until it
    grows: then `on_growth` is called."""

    def __init__(self, device: Device, on_growth: Callable[[], None]) -> None:
        self._device = device
        self._on_growth = on_growth
        self._staged = _Staged(device, 4 << 16)

    def host(self, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """The array to fill before the next `upload`."""
        size = 4 * math.prod(shape)
        if size > len(self._staged.memory):
            self._staged = _Staged(self._device, 1 << (size - 1).bit_length())
            self._on_growth()
        array: NDArray[np.int32] = self._staged.host()[:size].view(torch.int32).numpy()
        return array.reshape(shape)

    def upload(self, lane: Lane, shape: tuple[int, ...]) -> Tensor:
        """Begin to copy what was filled in; the array, `shape`, on the device."""
        size = 4 * math.prod(shape)
        self._staged.upload(lane, size)
        return self._staged.memory[:size].view(torch.int32).view(shape)
