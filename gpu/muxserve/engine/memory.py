"""Anonymous shared memory of a fixed size, and how much memory there is for it. Linux, no torch."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, which Python's mmap does not name yet."""


class Memfd:
    """A memfd whose size is sealed, mapped for reading and writing.

    Nothing has a name, so a crash leaves nothing behind: the memory goes with its last descriptor and map.
    Pages are zero, and taken from the machine when first touched or, `reserved`, at once. Sealing makes an
    access inside the mapping safe for ever: no process can cut the file under another, which would end that
    one with SIGBUS.

    `fd`: to be passed to other processes; closed by `close()`. -1 for the side that attached.
    `data`: uint8 `[size]`, writable.
    """

    def __init__(self, fd: int, size: int, *, owns: bool, reserved: bool = False) -> None:
        self.fd = fd if owns else -1
        mapping = mmap.mmap(fd, size)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages for shared memory
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if reserved:
            with contextlib.suppress(OSError):  # a kernel before 5.14: each page is mapped when first touched
                mapping.madvise(_POPULATE_WRITE)
        # The mapping lives as long as arrays over it: `close` never pulls it away from under a view.
        self.data: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)

    @classmethod
    def create(cls, name: str, size: int, *, reserved: bool = False) -> Memfd:
        """Zeroed memory of `size` bytes. `name` is for people who look into /proc; `reserved`: take all of it
        from the machine now. Raises OSError, also if that has not enough left."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            if reserved:
                os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
            return cls(fd, size, owns=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, size: int, *, reserved: bool = False) -> Memfd:
        """Map another process's memfd; the caller may close `fd` at once. `reserved`: map all of its pages
        now. ValueError if its size differs or could change."""
        found = os.fstat(fd).st_size
        if found != size:
            raise ValueError(f"the shared memory has {found} bytes, {size} are expected")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ValueError("the descriptor is not a memfd") from error
        if seals & _SIZE_SEALS != _SIZE_SEALS:
            raise ValueError("the shared memory's size is not sealed")
        return cls(fd, size, owns=False, reserved=reserved)

    def close(self) -> None:
        """Let go of the descriptor and of this object's view; the memory stays while others have theirs."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.data = np.empty(0, dtype=np.uint8)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping: the machine's, or if less its control groups' (v1 or v2).
    Raises OSError where there is no /proc."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    return min([machine, *_cgroup_room(proc, cgroups)])


def _cgroup_room(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left in this process's memory control group and in each group around it."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, use, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, use = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's and not there: then it is skipped, and the root stays.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                room = int((folder / limit).read_text()) - int((folder / use).read_text())
                yield max(0, room + _stat(folder / "memory.stat", cache))


def _stat(path: Path, key: str) -> int:
    """File cache that the kernel gives up when memory is short counts as used; this is how much."""
    for line in path.read_text().splitlines():
        name, value = line.split()
        if name == key:
            return int(value)
    return 0
