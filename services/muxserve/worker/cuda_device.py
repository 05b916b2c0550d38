"""`CudaDevice`: a GPU, of which the worker owns arena and weights, and on which executors compute."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.mps import CONTROL_PROGRAM, MpsDaemon
from muxserve.engine.cuda.probe import probe
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError, cuda_runtime, errors_of, on_device
from muxserve.engine.shares import cuda_index, detect
from muxserve.worker.executors import EXECUTOR, Kind
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.weight_memory import LOADER, DeviceMemories

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cuda:
    """What a CudaDevice is made with; tests have a device of their own."""

    runtime: CudaRuntime | None = None
    """None: CuPy's."""
    driver: Any = None
    """`cuda.bindings.driver` if None."""
    mps_program: str = CONTROL_PROGRAM
    executor: tuple[str, ...] = EXECUTOR
    loader: tuple[str, ...] = LOADER


class CudaDevice:
    """One executor for jobs of both kinds, on lanes; under MPS one for each kind, with its percentage."""

    def __init__(self, settings: WorkerSettings, cuda: Cuda | None = None) -> None:
        """Raises ArenaError, DeviceError; nothing is left behind."""
        cuda = cuda or Cuda()
        self._index = cuda_index(settings.device)
        self._runtime = cuda.runtime or cuda_runtime()
        self.executor = cuda.executor
        self.memories = DeviceMemories(self._index, self._runtime, cuda.loader, settings.host_budget)
        self.arena = CudaArena.create(
            int(settings.arena), int(settings.block_bytes), self._index, self._runtime
        )
        self._daemon: _Daemon | None = None
        self.executors: Sequence[tuple[Kind, Mapping[str, str]]] = (("both", {}),)
        try:
            found = probe(self._index, cuda.driver, cuda.mps_program)
            self.units = found.sms
            try:
                self.offer = detect(settings.device, found, settings.partition)
            except ValueError as error:
                field, _, reason = str(error).partition(": ")
                raise DeviceError(field, reason) from error
            if self.offer.partition == "mps":
                self._daemon = _Daemon(mps_directory(settings), cuda.mps_program)
                self.executors = (
                    ("prefill", self._daemon.mps.environment(settings.mps_prefill)),
                    ("decode", self._daemon.mps.environment(settings.mps_decode)),
                )
        except BaseException:
            self.arena.close()
            raise

    async def start(self) -> None:
        if self._daemon is not None:
            await asyncio.to_thread(self._daemon.start)

    async def stop(self) -> None:
        if self._daemon is not None:
            await asyncio.to_thread(self._daemon.stop)
        self.memories.close()
        self.arena.close()

    def room(self) -> int:
        # What is left of it is for what executors take while they run, and a loader's context.
        on_device(self._runtime, self._index)
        with errors_of("device", f"CUDA device {self._index}"):
            return int(0.9 * self._runtime.memGetInfo()[0])


class _Daemon:
    """An MPS daemon and its directory, which stays for people to look at if it does not start."""

    def __init__(self, directory: Path, program: str) -> None:
        self.mps = MpsDaemon(directory, program)
        self._directory = directory
        self._started = False

    def start(self) -> None:
        self.mps.start()
        self._started = True
        log.info("MPS daemon started", directory=str(self._directory))

    def stop(self) -> None:
        self.mps.stop()
        if self._started:
            shutil.rmtree(self._directory, ignore_errors=True)


def mps_directory(settings: WorkerSettings) -> Path:
    """A directory of this user's alone, the same when this worker is started again: a daemon that it has left
    there, because it was killed, is found and ended. Raises DeviceError."""
    name = hashlib.sha256(f"{settings.redis_url} {settings.id}".encode()).hexdigest()[:12]
    directory = Path(tempfile.gettempdir()) / f"muxserve-mps-{os.getuid()}-{name}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise DeviceError("partition", f"MPS: {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DeviceError("partition", f"MPS: {directory} is open to others")
    return directory
