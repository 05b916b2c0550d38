"""Finds what a tree of processes left behind: processes, anonymous shared memory, files in /dev/shm."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
MEMFD = "/memfd:"

Memory = tuple[int, int]
"""Device and inode of a memfd: the same for everybody who has it."""


class Traces:
    """What a tree of processes has, recorded while it runs, to be looked for after its end."""

    def __init__(self) -> None:
        self._processes: set[psutil.Process] = set()
        self._memory: set[Memory] = set()
        self._files = _shared_files()

    def record(self, root: int) -> None:
        """Remember process `root`, its descendants, and the memfds that they have."""
        try:
            parent = psutil.Process(root)
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self._processes.update(family)
        for process in family:
            self._memory |= _memfds(process.pid)

    def left(self) -> list[str]:
        """What is still there, in words."""
        # Compared by start time as well, so that a process with a reused id is not ours.
        found = [
            f"process {process.pid}"
            for process in self._processes
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]
        # Listed first: one that somebody makes while processes are asked would seem to be held by nobody.
        files, held = _shared_files() - self._files, set[str]()
        for pid in psutil.pids():
            if _memfds(pid) & self._memory:
                found.append(f"shared memory held by process {pid}")
            held |= _held_files(pid)
        # A new file that somebody alive holds is somebody else's: ours are all dead.
        found += sorted((files - held) & _shared_files())
        return found


def _shared_files() -> set[str]:
    return {str(file) for file in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def _memfds(pid: int) -> set[Memory]:
    """Memfds that a process has open or mapped; empty if it is gone, or not ours to look at."""
    found: set[Memory] = set()
    for descriptor, target in _descriptors(pid):
        if target.startswith(MEMFD):
            with suppress(OSError):
                stat = descriptor.stat()
                found.add((stat.st_dev, stat.st_ino))
    for line in _mappings(pid):
        _, _, _, device, inode, *path = line.split(maxsplit=5)
        if path and path[0].startswith(MEMFD):
            major, minor = (int(part, 16) for part in device.split(":"))
            found.add((os.makedev(major, minor), int(inode)))
    return found


def _held_files(pid: int) -> set[str]:
    """Files in /dev/shm that a process has open or mapped."""
    paths = {target for _, target in _descriptors(pid)}
    paths.update(line.split(maxsplit=5)[-1] for line in _mappings(pid))
    return {path for path in paths if path.startswith(f"{SHARED_MEMORY}/")}


def _descriptors(pid: int) -> list[tuple[Path, str]]:
    found = []
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append((descriptor, str(descriptor.readlink())))
    return found


def _mappings(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
