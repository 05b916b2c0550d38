"""`WorkerDevice`: what a worker computes on: cores of this machine, or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from muxserve.engine.arena import Arena, SharedArena
from muxserve.engine.memory import available_memory
from muxserve.engine.shares import Offer, detect
from muxserve.worker.executors import EXECUTOR, Kind
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.weight_memory import SharedMemories, WeightMemories


class WorkerDevice(Protocol):
    """Has the arena, which it owns, from the beginning, and knows how executors and weights get theirs."""

    @property
    def arena(self) -> Arena: ...

    @property
    def memories(self) -> WeightMemories: ...

    @property
    def units(self) -> int:
        """Cores, or multiprocessors."""

    @property
    def offer(self) -> Offer:
        """How compute shares can be made here, and why so. Executors make sure of it."""

    @property
    def executor(self) -> tuple[str, ...]:
        """See `executors.EXECUTOR`."""

    @property
    def executors(self) -> Sequence[tuple[Kind, Mapping[str, str]]]:
        """See `Lanes`."""

    async def start(self) -> None:
        """Called before executors start. Raises DeviceError."""

    async def stop(self) -> None:
        """Called when executors have ended and no weights are left: give everything back."""

    def room(self) -> int:
        """Bytes that weights may take, with room for all else. To be asked when executors are ready."""


class CpuDevice:
    """Cores, and shared memory. Raises ArenaError."""

    executor: tuple[str, ...] = EXECUTOR

    def __init__(self, settings: WorkerSettings) -> None:
        self.offer = detect("cpu", wanted=settings.partition)
        self.units = settings.threads
        # On a part of the cores each, decode jobs of two models meet at no barrier, and one reads weights
        # while the other computes.
        decode = settings.decode_lanes or min(2, self.units)
        self.executors: Sequence[tuple[Kind, Mapping[str, str]]] = (
            ("prefill", {}),
            *(("decode", {}) for _ in range(decode)),
        )
        self.arena = SharedArena.create(int(settings.arena), int(settings.block_bytes))
        self.memories = SharedMemories(settings.kept_weights, host_budget=settings.host_budget)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.memories.close()
        self.arena.close()

    def room(self) -> int:
        # The arena's memory and the executors' own are taken by now.
        return int(0.9 * available_memory())


def open_device(settings: WorkerSettings) -> WorkerDevice:
    """The device that the settings name. Raises ArenaError, DeviceError."""
    if settings.device == "cpu":
        return CpuDevice(settings)
    from muxserve.worker.cuda_device import CudaDevice  # what runs on cores does without

    return CudaDevice(settings)
