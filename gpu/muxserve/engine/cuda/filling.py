"""A checkpoint's tensors into device memory, through a bounded amount of pinned host memory."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError, errors_of, on_device
from muxserve.engine.messages import WeightLayout

STAGING = 32 * 2**20
"""Bytes of pinned memory, of all threads together: pinning is slow and takes memory from everybody."""

_PART = 2**20
"""Bytes of a copy that a thread takes at a time."""

_BUFFERS = 2
"""Of each thread: one is converted into while the other is copied from."""


class Stretch(Protocol):
    """A part of weights that lies in one piece."""

    @property
    def offset(self) -> int:
        """Byte at which it lies in the weights."""


P = TypeVar("P", bound=Stretch)


class Source(Protocol[P]):
    """Where weights come from; `Checkpoint` says more of each method."""

    def weight_bytes(self) -> int: ...
    def pieces(self, layout: WeightLayout) -> Iterator[P]: ...
    def read(self, piece: P) -> NDArray[np.generic]: ...


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    size: int


class HostCopy:
    """Canonical weights in host memory, uint8 `[bytes]`: a `Source` of what `fill` has written to it."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data

    def weight_bytes(self) -> int:
        return len(self.data)

    def pieces(self, layout: WeightLayout) -> Iterator[_Part]:
        return (_Part(at, min(_PART, len(self.data) - at)) for at in range(0, len(self.data), _PART))

    def read(self, piece: _Part) -> NDArray[np.uint8]:
        return self.data[piece.offset : piece.offset + piece.size]


def fill(
    source: Source[Any],
    memory: DeviceMemory,
    threads: int = 2,
    staging: int = STAGING,
    copy: HostCopy | None = None,
) -> None:
    """Write every canonical tensor to its place in `memory`, and in `copy`; all of it is there on return.

    Host memory: `staging` bytes, pinned, and a piece of a tensor (about a megabyte) for each thread. Raises
    CheckpointError, DeviceError, OSError; the memory then holds a part.
    """
    needed = source.weight_bytes()
    if memory.size < needed:
        raise DeviceError("weights", f"{memory.size} bytes of memory for weights of {needed}")
    size = staging // (threads * _BUFFERS)
    if size < 1:
        raise DeviceError("weights", f"{staging} bytes of staging are too few for {threads} threads")
    filling = _Filling(source, memory, size, copy)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(filling.work) for _ in range(threads)]:
            done.result()


class _Filling:
    """By threads that each take the next piece until there is none left, or one of them has failed."""

    def __init__(self, source: Source[Any], memory: DeviceMemory, size: int, copy: HostCopy | None) -> None:
        self._source = source
        self._memory = memory
        self._size = size
        self._copy = copy
        self._pieces = source.pieces("canonical")
        self._lock = threading.Lock()
        self._failed = False

    def work(self) -> None:
        runtime = on_device(self._memory.runtime, self._memory.device)
        with errors_of("weights", "copying to the device"), ExitStack() as buffers, self._ending_others():
            turn = itertools.cycle([_Buffer(runtime, self._size, buffers) for _ in range(_BUFFERS)])
            for piece in self._next_pieces():
                data = np.ravel(self._source.read(piece)).view(np.uint8)
                if self._copy is not None:
                    self._copy.data[piece.offset : piece.offset + len(data)] = data
                for start in range(0, len(data), self._size):
                    part = data[start : start + self._size]
                    next(turn).copy(self._memory.pointer + piece.offset + start, part)

    @contextmanager
    def _ending_others(self) -> Iterator[None]:
        """A failure is known at once, before the thread that has it waits for its copies."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _next_pieces(self) -> Iterator[Stretch]:
        while not self._failed:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            yield piece


class _Buffer:
    """Pinned memory with a stream of its own. `undo` waits for what was begun, and gives both back."""

    def __init__(self, runtime: CudaRuntime, size: int, undo: ExitStack) -> None:
        self._runtime = runtime
        self._host = runtime.hostAlloc(size)
        undo.callback(runtime.freeHost, self._host)
        self._stream = runtime.streamCreate()
        undo.callback(runtime.streamDestroy, self._stream)
        undo.callback(runtime.streamSynchronize, self._stream)
        self._bytes: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * size).from_address(self._host)
        )

    def copy(self, device_pointer: int, data: NDArray[np.uint8]) -> None:
        """Begin to copy, once the copy before it has ended. `data` may be changed at once."""
        self._runtime.streamSynchronize(self._stream)
        self._bytes[: len(data)] = data
        self._runtime.copyToDevice(device_pointer, self._host, len(data), self._stream)
