"""`CudaArena`: an arena in the memory of a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from muxserve.engine.arena import ArenaError, whole_blocks
from muxserve.engine.cuda.memory import HANDLE_BYTES, DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError
from muxserve.engine.messages import AttachArena

if TYPE_CHECKING:
    from torch import Tensor


class CudaArena:
    """Blocks in a DeviceMemory, whose rules hold: it opens in other processes only; its owner closes last."""

    fd = -1

    def __init__(self, memory: DeviceMemory, descriptor: AttachArena) -> None:
        self._memory = memory
        self._descriptor = descriptor

    @classmethod
    def create(
        cls, size: int, block_bytes: int, device: int = 0, runtime: CudaRuntime | None = None
    ) -> CudaArena:
        """An arena of the whole blocks that fit `size` bytes of the device's free memory. Its bytes are what
        was there before. Raises ArenaError, with nothing allocated."""
        blocks = whole_blocks(size, block_bytes)
        with _arena_errors():
            memory = DeviceMemory.create(blocks * block_bytes, "arena", device, runtime)
        return cls(memory, AttachArena(block_bytes=block_bytes, blocks=blocks, cuda_handle=memory.handle))

    @classmethod
    def attach(
        cls, descriptor: AttachArena, device: int = 0, runtime: CudaRuntime | None = None
    ) -> CudaArena:
        """Map another process's arena. Raises ArenaError, also in the process that created it."""
        if len(descriptor.cuda_handle) != HANDLE_BYTES:
            raise ArenaError("arena", "its descriptor has no CUDA IPC handle")
        size = descriptor.blocks * descriptor.block_bytes
        with _arena_errors():
            memory = DeviceMemory.attach(descriptor.cuda_handle, size, "arena", device, runtime)
        return cls(memory, descriptor)

    @property
    def device(self) -> int:
        return self._memory.device

    @property
    def block_bytes(self) -> int:
        return self._descriptor.block_bytes

    @property
    def blocks(self) -> int:
        return self._descriptor.blocks

    def descriptor(self) -> AttachArena:
        return self._descriptor

    def tensor(self) -> Tensor:
        with _arena_errors():
            return self._memory.tensor()

    def close(self) -> None:
        with _arena_errors():
            self._memory.close()


@contextmanager
def _arena_errors() -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        raise ArenaError(error.field, error.reason) from error
