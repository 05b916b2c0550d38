"""`CudaRuntime`: the calls of CUDA that device memory is made with. CuPy has them, and tests have a fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_TO_DEVICE = 1
"""cudaMemcpyHostToDevice."""
_NON_BLOCKING = 1
"""cudaStreamNonBlocking: no waiting for, and none by, the legacy default stream."""


class DeviceError(ValueError):
    """Something of a GPU that cannot be. field: the setting or resource at fault (`arena`, `weights`,
    `device`, `partition`). reason: for whoever set it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class CudaRuntime(Protocol):
    """What we use of CUDA's runtime. Pointers and streams are integers, errors RuntimeErrors.

    Calls are for the thread's current device, which `setDevice` sets and which is the thread's own.
    """

    def getDeviceCount(self) -> int: ...
    def setDevice(self, device: int) -> None: ...
    def memGetInfo(self) -> tuple[int, int]:
        """Bytes free and in all."""

    def malloc(self, size: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def ipcGetMemHandle(self, pointer: int) -> bytes: ...
    def ipcOpenMemHandle(self, handle: bytes) -> int: ...
    def ipcCloseMemHandle(self, pointer: int) -> None: ...
    def hostAlloc(self, size: int) -> int:
        """Pinned host memory: copied from without a detour through the driver's own."""

    def freeHost(self, pointer: int) -> None: ...
    def streamCreate(self) -> int: ...
    def streamSynchronize(self, stream: int) -> None: ...
    def streamDestroy(self, stream: int) -> None: ...
    def copyToDevice(self, device_pointer: int, host_pointer: int, size: int, stream: int) -> None:
        """Begins; what is at `host_pointer` must stay as it is until the stream was synchronised."""

    def tensor(self, pointer: int, size: int, device: int) -> Tensor:
        """uint8 `[size]` over device memory, without a copy and owning nothing."""


class CupyRuntime:
    """`cupy.cuda.runtime` as a CudaRuntime. It and torch share the device's one primary context."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def getDeviceCount(self) -> int:
        return int(self._api.getDeviceCount())

    def setDevice(self, device: int) -> None:
        self._api.setDevice(device)

    def memGetInfo(self) -> tuple[int, int]:
        free, total = self._api.memGetInfo()
        return int(free), int(total)

    def malloc(self, size: int) -> int:
        return int(self._api.malloc(size))

    def free(self, pointer: int) -> None:
        self._api.free(pointer)

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        return bytes(self._api.ipcGetMemHandle(pointer))

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        return int(self._api.ipcOpenMemHandle(handle))

    def ipcCloseMemHandle(self, pointer: int) -> None:
        self._api.ipcCloseMemHandle(pointer)

    def hostAlloc(self, size: int) -> int:
        return int(self._api.hostAlloc(size, self._api.hostAllocDefault))

    def freeHost(self, pointer: int) -> None:
        self._api.freeHost(pointer)

    def streamCreate(self) -> int:
        return int(self._api.streamCreateWithFlags(_NON_BLOCKING))

    def streamSynchronize(self, stream: int) -> None:
        self._api.streamSynchronize(stream)

    def streamDestroy(self, stream: int) -> None:
        self._api.streamDestroy(stream)

    def copyToDevice(self, device_pointer: int, host_pointer: int, size: int, stream: int) -> None:
        self._api.memcpyAsync(device_pointer, host_pointer, size, _TO_DEVICE, stream)

    def tensor(self, pointer: int, size: int, device: int) -> Tensor:
        import torch  # executors only

        return torch.as_tensor(DeviceBytes(pointer, size), device=f"cuda:{device}")


class DeviceBytes:
    """Device memory as an object that torch and others view without a copy, by version 3 of the
    `__cuda_array_interface__` protocol."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
        }


def cuda_runtime() -> CudaRuntime:
    """CuPy's, if there is a device for it. Raises DeviceError that says what is missing."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise DeviceError("device", f"CUDA needs CuPy (install muxserve[cuda]): {error}") from error
    found = CupyRuntime(runtime)
    with errors_of("device", "no CUDA device"):
        if found.getDeviceCount() == 0:
            raise RuntimeError("none is visible")
    return found


def on_device(runtime: CudaRuntime | None, device: int) -> CudaRuntime:
    """The runtime (CuPy's, if None), its current device set for this thread. Raises DeviceError."""
    runtime = runtime or cuda_runtime()
    with errors_of("device", f"CUDA device {device}"):
        runtime.setDevice(device)
    return runtime


@contextmanager
def errors_of(field: str, what: str) -> Iterator[None]:
    """CUDA's errors as DeviceErrors of `field`."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(field, f"{what}: {error}") from error
