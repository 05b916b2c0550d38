"""Memory that weights are loaded into: shared memory of the machine, or a device's."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from muxserve.common.errors import Overloaded
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.messages import WeightLayout
from muxserve.engine.weights import weights_memfd
from muxserve.worker.shapes import Weights

LOADER = ("muxserve.worker.loader_process",)
"""The loader's module; arguments may follow, which come before all others."""


class WeightMemory(Protocol):
    """Of one checkpoint's weights. The worker owns it; loader and executors map it, and it is closed last."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """That executors are sent; they stay this object's. On a device: none."""

    @property
    def inherited(self) -> tuple[int, ...]:
        """Descriptors for the loader; they stay this object's."""

    @property
    def handle(self) -> bytes:
        """A cudaIpcMemHandle; empty where there are descriptors."""

    def loader_arguments(self) -> list[str]:
        """What tells the loader to fill it."""

    @property
    def full(self) -> bool:
        """Whether the weights are in it, so that there is nothing to load."""

    def filled(self) -> None:
        """The loader has filled it."""

    def progress(self) -> str:
        """How much of it is filled, for the log; empty: not known."""

    def close(self) -> None:
        """Nobody maps it any more, or will; the weights may be kept on the host. Raises DeviceError."""


class WeightMemories(Protocol):
    """Where weights lie on this worker."""

    @property
    def layout(self) -> WeightLayout:
        """As its executors take them."""

    @property
    def loader(self) -> tuple[str, ...]:
        """See LOADER."""

    def create(self, model: str, weights: Weights) -> WeightMemory:
        """Memory for them, to be filled unless it is full. Raises Overloaded or OSError where there is not so
        much."""

    def close(self) -> None:
        """Give back what is kept."""


@dataclass(frozen=True, slots=True)
class WeightCacheOptions:
    """Where weights that were dequantised are kept, and how many bytes of them."""

    directory: Path
    limit: int


class Kept:
    """Weights in memfds on the host, by fingerprint, for when they are wanted again. At most `budget` bytes:
    what was not used for longest makes room."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lent = 0
        self._memfds: OrderedDict[tuple[object, ...], tuple[int, int]] = OrderedDict()
        """(descriptor, bytes), least recently used first."""

    def take(self, weights: Weights) -> int | None:
        """The memfd with these weights, which is the caller's now; None: they are not kept."""
        return self._memfds.pop(weights.fingerprint, (None,))[0]

    def put(self, weights: Weights, fd: int) -> None:
        """Keep a memfd, which is this object's now; it is closed if there is no room."""
        before = self.take(weights)
        if before is not None:
            os.close(before)
        if self._make_room(weights.bytes):
            self._memfds[weights.fingerprint] = (fd, weights.bytes)
        else:
            os.close(fd)

    def lend(self, weights: Weights) -> bool:
        """Count these weights as kept though the caller has them. False: there is no room."""
        if not self._make_room(weights.bytes):
            return False
        self._lent += weights.bytes
        return True

    def lent(self, weights: Weights) -> None:
        """End of a `lend`."""
        self._lent -= weights.bytes

    def close(self) -> None:
        """Keep nothing any more."""
        for fd, _ in self._memfds.values():
            os.close(fd)
        self._memfds.clear()
        self._budget = 0

    def _make_room(self, size: int) -> bool:
        if size + self._lent > self._budget:
            return False
        while size + self._lent + sum(kept for _, kept in self._memfds.values()) > self._budget:
            os.close(self._memfds.popitem(last=False)[1][0])
        return True


class SharedMemories:
    """memfds. cache: of dequantised weights; None = nothing is kept there. host_budget: bytes of weights that
    stay in memory when nobody uses them."""

    loader = LOADER

    def __init__(
        self,
        cache: WeightCacheOptions | None = None,
        layout: WeightLayout = "panels",
        host_budget: int = 0,
    ) -> None:
        self.layout = layout
        self._cache = cache
        self._kept = Kept(host_budget)

    def create(self, model: str, weights: Weights) -> WeightMemory:
        fd = self._kept.take(weights)
        full = fd is not None
        return _SharedMemory(weights_memfd(weights.bytes) if fd is None else fd, weights, self, full=full)

    def close(self) -> None:
        self._kept.close()

    def loader_arguments(self) -> list[str]:
        """Of all memory alike."""
        if self._cache is None:
            return []
        return ["--cache", f"{self._cache.directory}", "--cache-limit", f"{self._cache.limit}"]

    def give_back(self, memory: _SharedMemory) -> None:
        """Nobody uses it."""
        (fd,) = memory.descriptors
        if memory.full:
            self._kept.put(memory.weights, fd)
        else:
            os.close(fd)


class _SharedMemory:
    handle = b""

    def __init__(self, fd: int, weights: Weights, owner: SharedMemories, *, full: bool) -> None:
        self.descriptors = self.inherited = (fd,)
        self.weights = weights
        self.full = full
        self._owner = owner

    def loader_arguments(self) -> list[str]:
        return ["--fd", f"{self.descriptors[0]}", *self._owner.loader_arguments()]

    def filled(self) -> None:
        self.full = True

    def progress(self) -> str:
        # Memory is given to a memfd page by page, as it is written.
        return f"{min(1.0, os.fstat(self.descriptors[0]).st_blocks * 512 / self.weights.bytes):.0%}"

    def close(self) -> None:
        self._owner.give_back(self)


class DeviceMemories:
    """Allocations on a CUDA device. runtime: CuPy's if None. host_budget: bytes of copies on the host, from
    which weights come back to the device faster than from their files."""

    layout: WeightLayout = "canonical"

    def __init__(
        self,
        device: int,
        runtime: CudaRuntime | None = None,
        loader: tuple[str, ...] = LOADER,
        host_budget: int = 0,
    ) -> None:
        self.loader = loader
        self._device = device
        self._runtime = runtime
        self._kept = Kept(host_budget)

    def create(self, model: str, weights: Weights) -> WeightMemory:
        copy = self._copy(weights)
        try:
            return _DeviceMemory(DeviceWeights.create(weights.manifest, self._device, self._runtime), copy)
        except DeviceError as error:
            if copy is not None:
                copy.close()
            raise Overloaded(f'weights of model "{model}": {error.reason}', retry_after=None) from error

    def close(self) -> None:
        self._kept.close()

    def _copy(self, weights: Weights) -> _Copy | None:
        """The one that is kept, or memory for one; None: there is no room."""
        fd = self._kept.take(weights)
        full = fd is not None
        if not self._kept.lend(weights):
            return None
        return _Copy(weights_memfd(weights.bytes) if fd is None else fd, weights, self._kept, full=full)


class _Copy:
    """Of weights on a device, on the host."""

    def __init__(self, fd: int, weights: Weights, kept: Kept, *, full: bool) -> None:
        self.fd = fd
        self.full = full
        self._weights = weights
        self._kept = kept

    def close(self) -> None:
        """The device has them no more."""
        self._kept.lent(self._weights)
        if self.full:
            self._kept.put(self._weights, self.fd)
        else:
            os.close(self.fd)


class _DeviceMemory:
    descriptors: tuple[int, ...] = ()
    full = False

    def __init__(self, weights: DeviceWeights, copy: _Copy | None) -> None:
        self.handle = weights.handle
        self.inherited = () if copy is None else (copy.fd,)
        self._weights = weights
        self._copy = copy

    def loader_arguments(self) -> list[str]:
        arguments = ["--handle", self.handle.hex(), "--device", f"{self._weights.memory.device}"]
        if self._copy is not None:
            arguments += ["--copy", f"{self._copy.fd}"] + ["--copied"] * self._copy.full
        return arguments

    def filled(self) -> None:
        if self._copy is not None:
            self._copy.full = True

    def progress(self) -> str:
        return ""

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
        self._weights.release()
