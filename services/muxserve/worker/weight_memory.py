"""Memory that weights are loaded into: shared memory of the machine, or a device's."""

from __future__ import annotations

import os
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
        """That loader and executors inherit or are sent; they stay this object's. On a device: none."""

    @property
    def handle(self) -> bytes:
        """A cudaIpcMemHandle; empty where there are descriptors."""

    def loader_arguments(self) -> list[str]:
        """What tells the loader to fill it."""

    def progress(self) -> str:
        """How much of it is filled, for the log; empty: not known."""

    def close(self) -> None:
        """Nobody maps it any more, or will. Raises DeviceError."""


class WeightMemories(Protocol):
    """Where weights lie on this worker."""

    @property
    def layout(self) -> WeightLayout:
        """As its executors take them."""

    @property
    def loader(self) -> tuple[str, ...]:
        """See LOADER."""

    def create(self, model: str, weights: Weights) -> WeightMemory:
        """Memory for them, to be filled. Raises Overloaded or OSError where there is not so much."""


@dataclass(frozen=True, slots=True)
class WeightCacheOptions:
    """Where weights that were dequantised are kept, and how many bytes of them."""

    directory: Path
    limit: int


class SharedMemories:
    """memfds. cache: of dequantised weights; None = nothing is kept."""

    loader = LOADER

    def __init__(self, cache: WeightCacheOptions | None = None, layout: WeightLayout = "panels") -> None:
        self.layout = layout
        self._cache = cache

    def create(self, model: str, weights: Weights) -> WeightMemory:
        return _SharedMemory(weights_memfd(weights.bytes), weights.bytes, self._cache)


class _SharedMemory:
    handle = b""

    def __init__(self, fd: int, size: int, cache: WeightCacheOptions | None) -> None:
        self.descriptors = (fd,)
        self._size = size
        self._cache = cache

    def loader_arguments(self) -> list[str]:
        arguments = ["--fd", f"{self.descriptors[0]}"]
        if self._cache is not None:
            arguments += ["--cache", f"{self._cache.directory}", "--cache-limit", f"{self._cache.limit}"]
        return arguments

    def progress(self) -> str:
        # Memory is given to a memfd page by page, as it is written.
        return f"{min(1.0, os.fstat(self.descriptors[0]).st_blocks * 512 / self._size):.0%}"

    def close(self) -> None:
        os.close(self.descriptors[0])


class DeviceMemories:
    """Allocations on a CUDA device. runtime: CuPy's if None."""

    layout: WeightLayout = "canonical"

    def __init__(
        self, device: int, runtime: CudaRuntime | None = None, loader: tuple[str, ...] = LOADER
    ) -> None:
        self.loader = loader
        self._device = device
        self._runtime = runtime

    def create(self, model: str, weights: Weights) -> WeightMemory:
        try:
            return _DeviceMemory(DeviceWeights.create(weights.manifest, self._device, self._runtime))
        except DeviceError as error:
            raise Overloaded(f'weights of model "{model}": {error.reason}', retry_after=None) from error


class _DeviceMemory:
    descriptors: tuple[int, ...] = ()

    def __init__(self, weights: DeviceWeights) -> None:
        self.handle = weights.handle
        self._weights = weights

    def loader_arguments(self) -> list[str]:
        return ["--handle", self.handle.hex(), "--device", f"{self._weights.memory.device}"]

    def progress(self) -> str:
        return ""

    def close(self) -> None:
        self._weights.release()
