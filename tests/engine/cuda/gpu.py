"""A GPU engine with one model, as an executor has it, for tests to run jobs on, by interpreted kernels."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from muxserve.engine.checkpoint import Checkpoint
from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.driver import Driver
from muxserve.engine.cuda.filling import fill
from muxserve.engine.cuda.green import GreenContexts
from muxserve.engine.cuda.job import CudaJob
from muxserve.engine.cuda.runner import CudaRunner
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.messages import AddModel, DecodeJob, DecodeRow, PrefillChunk, PrefillJob, Sampling, Step
from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import SequenceTables
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.cuda.fake_driver import FakeDriver
from tests.engine.cuda.host_device import HostDevice

Tokens = list[int]
GREEDY = Sampling(temperature=0.0)


class GpuEngine:
    """One model over an arena full of NaN, its blocks scattered and all allocated; see `CpuEngine`.

    directory: is the device. The worker's side is this process, the executor's passes for its parent.
    """

    def __init__(
        self, checkpoint: Checkpoint, directory: Path, *, slots: int, context: int, block_bytes: int = 4096
    ) -> None:
        spec = checkpoint.spec
        directory.mkdir(exist_ok=True)
        self.owner = FakeRuntime(directory, 512 * MIB)
        self.user = FakeRuntime(directory, pid=os.getppid())
        self.layout = KVLayout(
            layers=len(spec.layers),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            block_bytes=block_bytes,
        )
        spans = self.layout.spans(context)
        blocks = slots * spans * self.layout.blocks_per_span
        self.arena = CudaArena.create((blocks + 1) * block_bytes, block_bytes, 0, self.owner)
        self.arena.tensor().fill_(0xFF)
        self.tables = SequenceTables.create(self.layout, slots, context)
        order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
        for slot, ids in enumerate(order.reshape(slots, spans, -1)):
            self.tables.acquire(slot)
            self.tables.assign(slot, 0, ids)
        self.weights = DeviceWeights.create(checkpoint.manifest(), 0, self.owner)
        fill(checkpoint, self.weights.memory, threads=1)
        self.driver = FakeDriver()
        self.host = HostDevice()
        partition = GreenContexts(Driver(self.driver, 0))
        self.runner = CudaRunner(0, self.host, partition, self.user)
        self.runner.attach(self.arena.descriptor(), [])
        self.command = AddModel(
            model="m",
            spec=spec,
            layout=self.layout,
            slots=slots,
            context=context,
            weights=checkpoint.manifest(),
            weights_handle=self.weights.handle,
        )
        self.runner.add(self.command, [os.dup(self.tables.fd)])

    def __enter__(self) -> GpuEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.close()
        self.user.check()
        self.weights.release()
        self.arena.close()
        self.owner.check()
        assert not self.driver.wrong

    def follow(self, job: CudaJob) -> Iterator[Step]:
        """A job's steps as they come; raises its fault at the end."""
        while not job.ended:
            select.select([self.runner], [], [], 60)
            self.runner.acknowledge()
            yield from job.collect()
        yield from job.collect()
        if job.error is not None:
            raise job.error

    def prefill(self, chunks: Sequence[PrefillChunk]) -> list[Step]:
        """One prefill job."""
        return list(self.follow(self.runner.start(PrefillJob(0, "m", tuple(chunks)))))

    def decode(self, rows: Sequence[DecodeRow], steps: int) -> list[Step]:
        """One decode job."""
        return list(self.follow(self.runner.start(DecodeJob(0, "m", tuple(rows), steps))))
