"""A CUDA runtime without a GPU, for processes that share a directory: CUDA's rules, and memory behind them.

Device memory is a file that every process maps, so that what one writes others read. What CUDA leaves
undefined (memory freed while others map it, a handle used after that, a double free) is written down, whether
or not the code at fault looks at its error: `check()` at the end of a test tells. A process that dies loses
its memory as it does with CUDA: others who read it then find DEAD bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

DEAD = 0xDB
"""What memory is filled with when it has gone: nobody is to read it."""

MIB = 1 << 20


class FakeRuntime:
    """One process's runtime. The first in a directory says how much memory the device has."""

    def __init__(
        self,
        directory: Path,
        total: int = 64 * MIB,
        *,
        devices: int = 1,
        ipc: bool = True,
        pid: int | None = None,
    ) -> None:
        """pid: of the process that it is to pass for, which lives."""
        self._pid = os.getpid() if pid is None else pid
        self._directory = directory
        self._devices = devices
        self._ipc = ipc
        self._views: dict[int, NDArray[np.uint8]] = {}
        """Device memory that this process can use, by pointer."""
        self._ids: dict[int, str] = {}
        self._mappings: dict[str, int] = {}
        """Pointers of what is open, by the allocation: opened again, CUDA gives the same."""
        self._host: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, list[tuple[int, int, int]]] = {}
        """Copies begun, and done only when waited for: so a buffer that is used again too early shows."""
        self._numbers = itertools.count(1)
        self.most_pinned = 0
        with self._registry() as registry:
            registry.setdefault("total", total)
            registry.setdefault("allocations", {})
            registry.setdefault("violations", [])

    def getDeviceCount(self) -> int:
        return self._devices

    def setDevice(self, device: int) -> None:
        if not 0 <= device < self._devices:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def memGetInfo(self) -> tuple[int, int]:
        with self._registry() as registry:
            total = registry["total"]
            return total - sum(a["size"] for a in registry["allocations"].values()), total

    def malloc(self, size: int) -> int:
        free, _ = self.memGetInfo()
        if size > free:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        number = secrets.token_hex(16)
        with self._file(number).open("wb") as file:
            file.truncate(size)
        with self._registry() as registry:
            registry["allocations"][number] = {"size": size, "owner": self._pid, "open": {}}
        return self._map(number)

    def free(self, pointer: int) -> None:
        with self._registry() as registry:
            number = self._ids.get(pointer, "")
            allocation = registry["allocations"].get(number)
            if allocation is None or allocation["owner"] != self._pid:
                registry["violations"].append(f"free of {pointer:#x}, which is not allocated")
                raise RuntimeError("cudaErrorInvalidValue: invalid argument")
            if allocation["open"]:
                registry["violations"].append("memory was freed while another process mapped it")
            del registry["allocations"][number]
            self._bury(number)
        self._unmap(pointer)

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        if not self._ipc:
            raise RuntimeError("cudaErrorNotSupported: operation not supported")
        return self._ids[pointer].encode().ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        number = handle.rstrip(b"\0").decode(errors="replace")
        with self._registry() as registry:
            allocation = registry["allocations"].get(number)
            if allocation is None:
                registry["violations"].append("a handle was opened after its memory had gone")
                raise RuntimeError("cudaErrorMapBufferObjectFailed: mapping of buffer object failed")
            if allocation["owner"] == self._pid:
                raise RuntimeError("cudaErrorInvalidContext: invalid device context")
            opened = allocation["open"]
            opened[str(self._pid)] = opened.get(str(self._pid), 0) + 1
        if number not in self._mappings:
            self._mappings[number] = self._map(number)
        return self._mappings[number]

    def ipcCloseMemHandle(self, pointer: int) -> None:
        with self._registry() as registry:
            number, process = self._ids.get(pointer, ""), str(self._pid)
            if self._mappings.get(number) != pointer:
                registry["violations"].append(f"close of {pointer:#x}, which is not mapped")
                raise RuntimeError("cudaErrorInvalidValue: invalid argument")
            left = 0
            if (allocation := registry["allocations"].get(number)) is not None:
                left = allocation["open"][process] = allocation["open"][process] - 1
                if not left:
                    del allocation["open"][process]
        if not left:
            del self._mappings[number]
            self._unmap(pointer)

    def hostAlloc(self, size: int) -> int:
        buffer = np.zeros(size, np.uint8)
        self._host[buffer.ctypes.data] = buffer
        self.most_pinned = max(self.most_pinned, sum(map(len, list(self._host.values()))))
        return buffer.ctypes.data

    def freeHost(self, pointer: int) -> None:
        buffer = self._host.pop(pointer)
        begun = [copy for copies in list(self._streams.values()) for copy in list(copies)]
        if any(pointer <= source < pointer + len(buffer) for _, source, _ in begun):
            raise AssertionError("pinned memory is freed while it is copied from")

    def streamCreate(self) -> int:
        stream = next(self._numbers)
        self._streams[stream] = []
        return stream

    def streamSynchronize(self, stream: int) -> None:
        copies, self._streams[stream] = self._streams[stream], []
        for device_pointer, host_pointer, size in copies:
            self.bytes(device_pointer, size)[:] = self._inside(self._host, host_pointer, size)

    def streamDestroy(self, stream: int) -> None:
        del self._streams[stream]

    def copyToDevice(self, device_pointer: int, host_pointer: int, size: int, stream: int) -> None:
        self._inside(self._views, device_pointer, size)
        self._inside(self._host, host_pointer, size)
        self._streams[stream].append((device_pointer, host_pointer, size))

    def tensor(self, pointer: int, size: int, device: int) -> Tensor:
        import torch  # many a process of these tests does without

        return torch.from_numpy(self.bytes(pointer, size))

    def bytes(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """Device memory as a kernel would see it."""
        return self._inside(self._views, pointer, size)

    def check(self) -> None:
        """To be called when this process should be done: nobody did wrong, and nothing of it is left."""
        with self._registry() as registry:
            mine = [a for a in registry["allocations"].values() if a["owner"] == self._pid]
            wrong = [*registry["violations"], *(f"never freed: {a['size']} bytes" for a in mine)]
        if self._views or self._host or self._streams:
            wrong.append("mappings, pinned memory or streams are left")
        if wrong:
            raise AssertionError("; ".join(wrong))

    @contextlib.contextmanager
    def _registry(self) -> Iterator[dict[str, Any]]:
        """What all processes know of the device, locked; rid of those that have died."""
        with (self._directory / "device").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            registry = json.loads(file.read() or "{}")
            for number, allocation in list(registry.get("allocations", {}).items()):
                allocation["open"] = {pid: n for pid, n in allocation["open"].items() if _lives(int(pid))}
                if not _lives(allocation["owner"]):
                    del registry["allocations"][number]
                    self._bury(number)
            try:
                yield registry
            finally:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(registry))
                file.flush()

    def _file(self, number: str) -> Path:
        return self._directory / number

    def _map(self, number: str) -> int:
        with self._file(number).open("r+b") as file:
            view: NDArray[np.uint8] = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        self._views[view.ctypes.data] = view
        self._ids[view.ctypes.data] = number
        return view.ctypes.data

    def _unmap(self, pointer: int) -> None:
        del self._views[pointer], self._ids[pointer]

    def _bury(self, number: str) -> None:
        path = self._file(number)
        with path.open("r+b") as file:  # in place: cut short, it would end those who still map it
            file.write(bytes([DEAD]) * path.stat().st_size)
        path.unlink()

    def _inside(self, ranges: dict[int, NDArray[np.uint8]], pointer: int, size: int) -> NDArray[np.uint8]:
        for start, view in list(ranges.items()):  # other threads may add to them meanwhile
            if start <= pointer and pointer + size <= start + len(view):
                return view[pointer - start : pointer - start + size]
        raise AssertionError(f"{size} bytes at {pointer:#x} are nobody's")


def _lives(pid: int) -> bool:
    """Has not ended: a zombie's memory is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
