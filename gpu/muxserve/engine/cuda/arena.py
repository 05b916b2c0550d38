"""`CudaArena`: an arena in the memory of a CUDA device. CuPy and torch are imported when first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

from muxserve.engine.arena import ArenaError, mebibytes, require_memory, whole_blocks
from muxserve.engine.messages import AttachArena

if TYPE_CHECKING:
    from torch import Tensor

IPC_HANDLE_BYTES = 64
"""sizeof(cudaIpcMemHandle_t)."""


class CudaRuntime(Protocol):
    """What an arena uses of `cupy.cuda.runtime`. Its errors are RuntimeErrors, its pointers integers."""

    def getDeviceCount(self) -> int: ...
    def setDevice(self, device: int) -> None: ...
    def memGetInfo(self) -> tuple[int, int]: ...
    def malloc(self, size: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def ipcGetMemHandle(self, pointer: int) -> bytes: ...
    def ipcOpenMemHandle(self, handle: bytes) -> int: ...
    def ipcCloseMemHandle(self, pointer: int) -> None: ...


class CudaArena:
    """One cudaMalloc, which other processes map through a CUDA IPC handle. No copy anywhere.

    Only cudaMalloc'ed memory can be exported so: torch's expandable segments and stream-ordered pools cannot,
    which is why the arena is not a tensor of torch's allocator. The handle opens in other processes of the
    machine that see the device; CUDA refuses it in the process that made it. The owner must close last: what
    an importer still maps when the owner frees it is undefined.
    """

    fd = -1

    def __init__(
        self, runtime: CudaRuntime, pointer: int, descriptor: AttachArena, device: int, *, owns: bool
    ) -> None:
        self._runtime = runtime
        self._pointer = pointer
        self._descriptor = descriptor
        self._owns = owns
        self.device = device

    @classmethod
    def create(
        cls, size: int, block_bytes: int, device: int = 0, runtime: CudaRuntime | None = None
    ) -> CudaArena:
        """An arena of the whole blocks that fit `size` bytes of the device's free memory. Its bytes are what
        was there before. Raises ArenaError, with nothing allocated."""
        blocks = whole_blocks(size, block_bytes)
        runtime = _on_device(runtime, device)
        with _errors_of("arena", f"{mebibytes(size)} on CUDA device {device}"):
            free, _ = runtime.memGetInfo()
            require_memory(size, free)
            pointer = runtime.malloc(blocks * block_bytes)
            try:
                handle = runtime.ipcGetMemHandle(pointer)
            except BaseException:
                runtime.free(pointer)
                raise
        descriptor = AttachArena(block_bytes=block_bytes, blocks=blocks, cuda_handle=bytes(handle))
        return cls(runtime, pointer, descriptor, device, owns=True)

    @classmethod
    def attach(
        cls, descriptor: AttachArena, device: int = 0, runtime: CudaRuntime | None = None
    ) -> CudaArena:
        """Map another process's arena. Raises ArenaError, also in the process that created it."""
        if len(descriptor.cuda_handle) != IPC_HANDLE_BYTES:
            raise ArenaError("arena", "its descriptor has no CUDA IPC handle")
        runtime = _on_device(runtime, device)
        with _errors_of("arena", f"the IPC handle on CUDA device {device}"):
            pointer = runtime.ipcOpenMemHandle(descriptor.cuda_handle)
        return cls(runtime, pointer, descriptor, device, owns=False)

    @property
    def block_bytes(self) -> int:
        return self._descriptor.block_bytes

    @property
    def blocks(self) -> int:
        return self._descriptor.blocks

    def descriptor(self) -> AttachArena:
        return self._descriptor

    def tensor(self) -> Tensor:
        import torch  # executors only

        return torch.as_tensor(DeviceBytes(self), device=f"cuda:{self.device}")

    def close(self) -> None:
        pointer, self._pointer = self._pointer, 0
        if not pointer:
            return
        _on_device(self._runtime, self.device)
        with _errors_of("arena", f"closing on CUDA device {self.device}"):
            if self._owns:
                self._runtime.free(pointer)
            else:
                self._runtime.ipcCloseMemHandle(pointer)


class DeviceBytes:
    """An open arena as an object that torch and others view without a copy, by version 3 of the
    `__cuda_array_interface__` protocol. Keeps the arena alive, not open."""

    def __init__(self, arena: CudaArena) -> None:
        self._arena = arena

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        arena = self._arena
        if not arena._pointer:
            raise ArenaError("arena", "it is closed")
        return {
            "version": 3,
            "shape": (arena.blocks * arena.block_bytes,),
            "typestr": "|u1",
            "data": (arena._pointer, False),
            "strides": None,
        }


def cuda_runtime() -> CudaRuntime:
    """CuPy's, if there is a device for it. Raises ArenaError that says what is missing."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise ArenaError("device", f"CUDA needs CuPy (install muxserve[cuda]): {error}") from error
    with _errors_of("device", "no CUDA device"):
        if runtime.getDeviceCount() == 0:
            raise RuntimeError("none is visible")
    return cast(CudaRuntime, runtime)


def _on_device(runtime: CudaRuntime | None, device: int) -> CudaRuntime:
    """The runtime (CuPy's, if None), its current device set for this thread."""
    runtime = runtime or cuda_runtime()
    with _errors_of("device", f"CUDA device {device}"):
        runtime.setDevice(device)
    return runtime


@contextmanager
def _errors_of(field: str, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ArenaError(field, f"{what}: {error}") from error
