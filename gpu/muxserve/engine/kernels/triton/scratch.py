"""`Scratch`: memory for what a pass computes on its way, taken once and used again by every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 256
_GRANULE = 16 * 2**20


class Scratch:
    """A stack of tensors in one allocation, of one stream of work at a time.

    torch's own allocator keeps memory apart for each stream, and a job may go on another stream at any step:
    there would be as many copies of the largest pass as there are lanes. And a graph needs its memory to stay
    where it is.

    It grows when it has to, by a new allocation: what the old one holds stays there until nobody has it, but
    `on_growth` is called, since graphs that were captured over the old one keep it alive for nothing else.
    """

    def __init__(self, device: torch.device, on_growth: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self._on_growth = on_growth
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._top = 0

    @property
    def bytes(self) -> int:
        """Of the allocation."""
        return len(self._memory)

    def new(
        self, shape: tuple[int, ...], /, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """An uninitialised tensor on top of the stack."""
        size = math.prod(shape) * dtype.itemsize
        begin = -(-self._top // _ALIGNMENT) * _ALIGNMENT
        if begin + size > len(self._memory):
            self._grow(begin + size)
        self._top = begin + size
        return self._memory[begin : self._top].view(dtype).view(shape)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What was taken inside is given back at the end."""
        top = self._top
        try:
            yield
        finally:
            self._top = top

    def _grow(self, needed: int) -> None:
        needed = max(needed, len(self._memory) * 5 // 4)
        size = -(-needed // _GRANULE) * _GRANULE
        self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._on_growth()
