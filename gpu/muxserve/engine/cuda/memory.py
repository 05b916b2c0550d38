"""`DeviceMemory`: an allocation on a CUDA device that several processes map, for arena and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muxserve.engine.arena import mebibytes
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError, errors_of, on_device

if TYPE_CHECKING:
    from torch import Tensor

HANDLE_BYTES = 64
"""sizeof(cudaIpcMemHandle_t)."""

GRANULE = 2 * 2**20
"""cudaMalloc cuts smaller allocations out of blocks of this size, and a handle shares the whole block with
whatever else lies in it: so sizes are rounded up to it, and no block is shared by accident."""


class DeviceMemory:
    """Bytes of a device, from one cudaMalloc, which other processes map through a CUDA IPC handle.

    Only cudaMalloc'ed memory can be exported so: torch's expandable segments and stream-ordered pools cannot,
    which is why none of it comes from torch's allocator. The handle opens in other processes of the machine
    that see the device; CUDA refuses it in the process that made it. The owner must close last: what an
    importer still maps when the owner frees it, or dies (see `muxserve.engine.cuda.owner`), is undefined.

    field: what it holds (`arena`, `weights`), for errors. size: bytes, of which `tensor()` shows all.
    """

    def __init__(
        self,
        runtime: CudaRuntime,
        pointer: int,
        size: int,
        field: str,
        device: int,
        handle: bytes,
        *,
        owns: bool,
    ) -> None:
        self._runtime = runtime
        self._pointer = pointer
        self._owns = owns
        self.size = size
        self.field = field
        self.device = device
        self.handle = handle

    @classmethod
    def create(
        cls, size: int, field: str, device: int = 0, runtime: CudaRuntime | None = None
    ) -> DeviceMemory:
        """Memory of `size` bytes, which are what was there before. Raises DeviceError, nothing allocated."""
        if size <= 0:
            raise DeviceError(field, f"{size} bytes are asked for")
        runtime = on_device(runtime, device)
        with errors_of(field, f"{mebibytes(size)} on CUDA device {device}"):
            taken = -(-size // GRANULE) * GRANULE
            free, _ = runtime.memGetInfo()
            if taken > free:
                raise DeviceError(field, f"{mebibytes(taken)} are asked for, {mebibytes(free)} are available")
            pointer = runtime.malloc(taken)
            try:
                handle = runtime.ipcGetMemHandle(pointer)
            except BaseException:
                runtime.free(pointer)
                raise
        return cls(runtime, pointer, size, field, device, handle, owns=True)

    @classmethod
    def attach(
        cls, handle: bytes, size: int, field: str, device: int = 0, runtime: CudaRuntime | None = None
    ) -> DeviceMemory:
        """Map another process's memory of `size` bytes, which CUDA does not check. Raises DeviceError, also
        in the process that created it."""
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(field, f"{len(handle)} bytes are no CUDA IPC handle")
        runtime = on_device(runtime, device)
        with errors_of(field, f"the IPC handle on CUDA device {device}"):
            pointer = runtime.ipcOpenMemHandle(handle)
        return cls(runtime, pointer, size, field, device, handle, owns=False)

    @property
    def runtime(self) -> CudaRuntime:
        """What it was made with."""
        return self._runtime

    @property
    def pointer(self) -> int:
        """Address of the first byte on the device. Raises DeviceError once it is closed."""
        if not self._pointer:
            raise DeviceError(self.field, "its memory is closed")
        return self._pointer

    def tensor(self) -> Tensor:
        """uint8 `[size]` on the device: a view, not to be used after `close`. Raises DeviceError."""
        return self._runtime.tensor(self.pointer, self.size, self.device)

    def close(self) -> None:
        """Free it, or unmap it where it is another's; a second call does nothing. Raises DeviceError."""
        pointer, self._pointer = self._pointer, 0
        if not pointer:
            return
        on_device(self._runtime, self.device)
        with errors_of(self.field, f"closing on CUDA device {self.device}"):
            if self._owns:
                self._runtime.free(pointer)
            else:
                self._runtime.ipcCloseMemHandle(pointer)
