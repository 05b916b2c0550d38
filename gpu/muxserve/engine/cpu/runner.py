"""`CpuRunner`: jobs on this machine's cores, over memory that the worker owns. Knows no sockets, no torch."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Iterator
from contextlib import suppress

from muxserve.engine.arena import SharedArena
from muxserve.engine.cpu.jobs import NativeJob
from muxserve.engine.cpu.library import load
from muxserve.engine.cpu.model import NativeModel
from muxserve.engine.messages import AddModel, AttachArena, DecodeJob, PrefillJob, Step
from muxserve.engine.tables import TableViews
from muxserve.engine.weights import map_weights


class CpuRunner:
    """A `Runner` of one job at a time: its process is for one kind.

    A job runs on threads of the library's own: `start` returns at once, and `fileno` becomes readable when
    there is something to collect. cores: most threads that a job can use.
    """

    device = "cpu"
    partition = "threads"

    def __init__(self, cores: int, variant: str = "") -> None:
        self._library = load(variant)
        self._engine = self._library.muxserve_engine_new(cores)
        self._event = self._library.muxserve_engine_event(self._engine)
        self._cores = cores
        self._models: dict[str, NativeModel] = {}
        self._arena: SharedArena | None = None

    def close(self) -> None:
        """End the threads; no job may be running."""
        if self._engine:
            self._library.muxserve_engine_free(self._engine)
            self._engine = None

    def fileno(self) -> int:
        """Readable when a step, or the job, has ended since `acknowledge`."""
        return int(self._event)

    def acknowledge(self) -> None:
        """To be called before collecting: what ends from now on makes `fileno` readable again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def attach(self, command: AttachArena, descriptors: list[int]) -> None:
        """Map the arena. Raises ArenaError."""
        (arena,) = descriptors
        try:
            self._arena = SharedArena.attach(arena, command)
        finally:
            os.close(arena)

    def add(self, command: AddModel, descriptors: list[int]) -> None:
        """Map a model, of which the weights come first. Raises ValueError, KeyError if it cannot be run."""
        assert self._arena is not None
        weights_fd, tables_fd = descriptors
        try:
            weights = map_weights(weights_fd, command.weights)
            tables = TableViews.attach(tables_fd, command.layout, command.slots, command.context)
        finally:
            os.close(weights_fd)
            os.close(tables_fd)
        self._models[command.model] = NativeModel(
            command.spec, weights, self._arena.data, tables, command.layout
        )

    def remove(self, model: str) -> None:
        """Let go of a model's memory. Unknown names are ignored."""
        self._models.pop(model, None)

    def start(self, message: PrefillJob | DecodeJob) -> NativeJob:
        """Start a job; the one before it has ended. Raises KeyError for an unknown model."""
        job = NativeJob(message, self._models[message.model], self._cores)
        self._library.muxserve_engine_submit(self._engine, ctypes.byref(job.struct))
        return job

    def run(self, message: PrefillJob | DecodeJob) -> Iterator[Step]:
        """Run a job and yield its steps as they come; raises its fault at the end."""
        job = self.start(message)
        try:
            while not job.ended:
                select.select([self], [], [])
                self.acknowledge()
                yield from job.collect()
            yield from job.collect()
        finally:
            job.stop()
            while not job.ended:
                select.select([self], [], [])
                self.acknowledge()
        if job.error is not None:
            raise job.error
