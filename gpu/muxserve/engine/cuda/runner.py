"""`CudaRunner`: jobs on a GPU, over memory that the worker owns, by a thread for each kind of them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.decoding import Decoding
from muxserve.engine.cuda.device import Device
from muxserve.engine.cuda.driver import Driver
from muxserve.engine.cuda.job import CudaJob
from muxserve.engine.cuda.lanes import Partition
from muxserve.engine.cuda.model import CudaModel
from muxserve.engine.cuda.placing import Placing
from muxserve.engine.cuda.prefilling import Prefilling
from muxserve.engine.cuda.probe import open_partition, probe
from muxserve.engine.cuda.runtime import CudaRuntime
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.messages import AddModel, AttachArena, DecodeJob, PrefillJob
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.shares import PartitionName, detect
from muxserve.engine.tables import TableViews

_SWITCH = 0.0002
"""Seconds."""


class DeviceLost(RuntimeError):
    """The device answers no more in this process: it has to be started again."""


class CudaRunner:
    """Implements `Runner`: a prefill job and a decode job at a time.

    Memory that jobs need beside weights and blocks is of the process, not of a model: the runner's scratch,
    as large as the largest pass so far, and a graph for each shape of batch that comes up again.
    """

    def __init__(
        self, index: int, device: Device, partition: Partition, runtime: CudaRuntime | None = None
    ) -> None:
        """runtime: CuPy's, if None."""
        self.device = device.name
        self.partition: str = partition.name
        self._index = index
        self._partition = partition
        self._runtime = runtime
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._arena: CudaArena | None = None
        self._models: dict[str, CudaModel] = {}
        placings = (Placing(partition, "prefill"), Placing(partition, "decode"))
        self._prefilling, self._decoding = Prefilling(device, placings[0]), Decoding(device, placings[1])
        self._threads = {
            PrefillJob: _JobThread("prefill", device, placings[0], self._prefilling.run, self._notify),
            DecodeJob: _JobThread("decode", device, placings[1], self._decoding.run, self._notify),
        }

    def fileno(self) -> int:
        """See `Runner.fileno`."""
        return self._event

    def acknowledge(self) -> None:
        """See `Runner.acknowledge`. Raises DeviceLost."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        for thread in self._threads.values():
            if thread.lost is not None:
                raise DeviceLost(str(thread.lost)) from thread.lost

    def attach(self, command: AttachArena, descriptors: list[int]) -> None:
        """See `Runner.attach`."""
        for descriptor in descriptors:
            os.close(descriptor)
        self._arena = CudaArena.attach(command, self._index, self._runtime)

    def add(self, command: AddModel, descriptors: list[int]) -> None:
        """See `Runner.add`. Raises DeviceError, KeyError for a weight that is missing, ValueError."""
        (tables_fd,) = descriptors
        try:
            tables = TableViews.attach(tables_fd, command.layout, command.slots, command.context)
        finally:
            os.close(tables_fd)
        assert self._arena is not None
        weights = DeviceWeights.attach(command.weights_handle, command.weights, self._index, self._runtime)
        try:
            tensors = weights.tensors()
            kernels = {"prefill": self._prefilling.kernels, "decode": self._decoding.kernels}
            decoders = {kind: Decoder(command.spec, tensors, of) for kind, of in kernels.items()}
            model = CudaModel(command, weights, tables, self._arena.tensor(), decoders)
        except BaseException:
            weights.release()
            raise
        self.remove(command.model)
        self._models[command.model] = model

    def remove(self, model: str) -> None:
        """See `Runner.remove`."""
        if (found := self._models.pop(model, None)) is not None:
            self._prefilling.graphs.forget(model)
            self._decoding.graphs.forget(model)
            found.close()

    def start(self, message: PrefillJob | DecodeJob) -> CudaJob:
        """See `Runner.start`."""
        model, job = self._models[message.model], CudaJob(message)
        self._threads[type(message)].submit(job, model)
        return job

    def close(self) -> None:
        """See `Runner.close`."""
        for thread in self._threads.values():
            thread.close()
        for name in list(self._models):
            self.remove(name)
        if self._arena is not None:
            self._arena.close()
        self._partition.close()
        os.close(self._event)

    def _notify(self) -> None:
        os.eventfd_write(self._event, 1)


Run = Callable[[CudaJob, CudaModel, Callable[[], None]], None]


class _JobThread:
    """Runs the jobs of one kind, one after another. lost: why the device is."""

    def __init__(
        self, kind: str, device: Device, placing: Placing, run: Run, notify: Callable[[], None]
    ) -> None:
        self.lost: Exception | None = None
        self._device = device
        self._placing = placing
        self._run = run
        self._notify = notify
        self._jobs: SimpleQueue[tuple[CudaJob, CudaModel] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=kind, daemon=True)
        self._thread.start()

    def submit(self, job: CudaJob, model: CudaModel) -> None:
        """To be run when the one before it has ended."""
        self._jobs.put((job, model))

    def close(self) -> None:
        """Returns when all have ended."""
        self._jobs.put(None)
        self._thread.join()

    def _serve(self) -> None:
        self._device.enter()
        while (next_ := self._jobs.get()) is not None:
            job, model = next_
            error = None
            try:
                self._run(job, model, self._notify)
            except Exception as fault:
                error = fault
            try:
                self._placing.wait(self._device)
            except Exception as fault:
                self.lost = fault
            job.end(error)
            self._notify()


def open_runner(index: int, wanted: PartitionName | str = "auto") -> tuple[CudaRunner, str]:
    """A runner for CUDA device `index`, and a line that says why its partition is what it is.

    Raises DeviceError, DriverError, ValueError for a partition that cannot be had.
    """
    from muxserve.engine.cuda.device import TorchDevice  # needs torch with CUDA

    # A thread that launches a prefill's kernels holds the interpreter until another asks for it so long: by
    # default as long as a decode step takes.
    sys.setswitchinterval(_SWITCH)
    offer = detect(f"cuda:{index}", probe(index), wanted)  # type: ignore[arg-type]  # checked there
    device = TorchDevice(index)
    device.enter()
    partition, reason = open_partition(offer, Driver.load(index))
    return CudaRunner(index, device, partition), reason
