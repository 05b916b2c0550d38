"""`Unit`: an arena, models with random weights and a runner: a worker and its executor, without services."""

from __future__ import annotations

import itertools
import os
import select
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.owner import Held, open_owner
from benchmarks.gpu.shapes import Shape, fill_weights, layout_of
from muxserve.engine.checkpoint.canonical import manifest_bytes
from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.device import Device, TorchDevice
from muxserve.engine.cuda.driver import Driver
from muxserve.engine.cuda.lanes import Lane, Partition
from muxserve.engine.cuda.probe import open_partition, probe
from muxserve.engine.cuda.runner import CudaRunner
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.messages import (
    AddModel,
    AttachArena,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Sampling,
    Shares,
    Step,
    TensorEntry,
)
from muxserve.engine.runner import RunningJob
from muxserve.engine.shares import PartitionName, detect
from muxserve.engine.spec import KVLayout, ModelSpec
from muxserve.engine.tables import SequenceTables

GREEDY = Sampling(temperature=0.0)
ALONE = Shares()
UNLIMITED = 1 << 20
"""Tokens of a sequence: none ends by its length here."""
BLOCK_BYTES = 16 * 1024
Piece = tuple[int, int]
"""Tokens `[begin, end)` of a sequence."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the unit. Slots 0, 1, … are its sequences."""

    name: str
    spec: ModelSpec
    layout: KVLayout
    tables: SequenceTables
    command: AddModel
    weights: Held


class Unit:
    """To be used in a `with`: it gives everything back. `open` makes a runner; models stay as they are."""

    def __init__(self, context: Context, arena_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._device = context.device
        self._undo = ExitStack()
        folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
        self._owner, self.runtime = open_owner(context.device, folder)
        self._undo.callback(self._owner.close)
        blocks = arena_bytes // block_bytes
        self._wait_for(arena_bytes)
        arena = self._owner.create(blocks * block_bytes)
        self._attach = AttachArena(block_bytes=block_bytes, blocks=blocks, cuda_handle=arena.handle)
        # Blocks are given out in no order: that is how they lie in a unit that has run for a while.
        self._free = np.random.default_rng(1).permutation(blocks).astype(np.int32)
        self.models: dict[str, Served] = {}
        self._runner: CudaRunner | None = None
        self._numbers = itertools.count()
        self.reason = ""
        self._fill_arena()

    def __enter__(self) -> Unit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()
        for name in list(self.models):
            self.remove(name)
        self._undo.close()

    @property
    def runner(self) -> CudaRunner:
        assert self._runner is not None
        return self._runner

    def open(self, partition: PartitionName = "none", *, eager: bool = False) -> None:
        """A runner with those lanes, in place of the one before. eager: it captures nothing. Raises
        DeviceError, DriverError, ValueError for lanes that cannot be had."""
        self.shut()
        device, lanes, self.reason = _device(self._device, partition, eager)
        self._runner = CudaRunner(0, device, lanes, self.runtime)
        self._runner.attach(self._attach, [])
        for model in self.models.values():
            self._runner.add(model.command, [os.dup(model.tables.fd)])

    def shut(self) -> None:
        """Give up the runner."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _wait_for(self, size: int) -> None:
        """What a process that was ended had is given back in the driver's own time."""
        ends = time.monotonic() + 10
        while self.runtime.memGetInfo()[0] < size and time.monotonic() < ends:
            select.select([], [], [], 0.1)

    def _fill_arena(self) -> None:
        """With random numbers, which are such in any dtype: KV of nobody in particular."""
        arena = CudaArena.attach(self._attach, runtime=self.runtime)
        for part in torch.split(arena.tensor(), 1 << 30):
            part.view(torch.bfloat16).normal_()
        _synchronize(self._device)
        arena.close()

    def add(self, name: str, shape: Shape, slots: int, context: int, seed: int = 0) -> Served:
        """A model of random weights, with tables for `slots` sequences of up to `context` tokens."""

        def fill(weights: DeviceWeights) -> None:
            fill_weights(weights.tensors(), seed)

        return self.add_filled(name, shape.spec, shape.manifest, fill, slots, context)

    def add_filled(
        self,
        name: str,
        spec: ModelSpec,
        manifest: tuple[TensorEntry, ...],
        fill: Callable[[DeviceWeights], None],
        slots: int,
        context: int,
    ) -> Served:
        """A model whose weights `fill` writes."""
        layout = layout_of(spec, self._attach.block_bytes)
        held = self._owner.create(manifest_bytes(manifest))
        weights = DeviceWeights.attach(held.handle, manifest, runtime=self.runtime)
        fill(weights)
        _synchronize(self._device)
        tables = SequenceTables.create(layout, slots, context)
        command = AddModel(
            model=name,
            spec=spec,
            layout=layout,
            slots=slots,
            context=context,
            weights=manifest,
            weights_handle=held.handle,
        )
        if self._runner is not None:
            self._runner.add(command, [os.dup(tables.fd)])
        weights.release()
        self.models[name] = served = Served(name, spec, layout, tables, command, held)
        return served

    def remove(self, name: str) -> None:
        """Give up a model, which has no blocks any more, and its weights."""
        model = self.models.pop(name)
        if self._runner is not None:
            self._runner.remove(name)
        model.tables.close()
        self._owner.free(model.weights)

    def place(self, model: Served, lengths: Sequence[int]) -> list[int]:
        """Slots for sequences of so many known tokens, whose KV is whatever lies in their blocks. Raises
        MemoryError, with nothing placed."""
        slots, tables, layout = [], model.tables, model.layout
        wanted = sum(map(layout.spans, lengths)) * layout.blocks_per_span
        if wanted > len(self._free):
            raise MemoryError(f"{wanted} blocks are wanted and {len(self._free)} are free")
        for length in lengths:
            slot = tables.acquire(model.name)
            slots.append(slot)
            count = layout.spans(length) * layout.blocks_per_span
            ids, self._free = self._free[:count], self._free[count:]
            tables.assign(slot, 0, ids.reshape(-1, layout.blocks_per_span))
            tables.tokens[slot, :length] = (np.arange(length) * 7919 + 31 * slot) % model.spec.vocab_size
        return slots

    def empty(self, model: Served, slots: Sequence[int]) -> None:
        """Give up these slots, and their blocks."""
        given = model.tables.blocks[:, slots]
        self._free = np.concatenate([self._free, given[given >= 0]])
        for slot in slots:
            model.tables.release(slot)

    def prefill(
        self,
        model: Served,
        pieces: dict[int, Piece],
        shares: Shares = ALONE,
        sampled: Callable[[int], bool] = lambda _: True,
    ) -> RunningJob:
        """Start to compute those tokens of those slots, and, of slots that are to be `sampled`, the next one,
        greedily."""
        chunks = tuple(
            PrefillChunk(slot, begin, end, UNLIMITED, GREEDY if sampled(slot) else None)
            for slot, (begin, end) in pieces.items()
        )
        return self.runner.start(PrefillJob(next(self._numbers), model.name, chunks, shares))

    def decode(
        self, model: Served, lengths: dict[int, int], steps: int, shares: Shares = ALONE
    ) -> RunningJob:
        """Start a job of those slots, so many tokens of each known."""
        rows = tuple(DecodeRow(slot, length, UNLIMITED, GREEDY) for slot, length in lengths.items())
        return self.runner.start(DecodeJob(next(self._numbers), model.name, rows, steps, shares))

    def finish(self, job: RunningJob, told: Callable[[Step], None] = lambda _: None) -> list[float]:
        """Wait for a job; when its steps came. Raises what went wrong with it."""
        times: list[float] = []

        def arrived(step: Step) -> None:
            times.append(time.perf_counter())
            told(step)

        while not job.ended:
            select.select([self.runner], [], [], 60)
            self.runner.acknowledge()
            collect(job, arrived)
        collect(job, arrived)
        if job.error is not None:
            raise job.error
        return times


def collect(job: RunningJob, told: Callable[[Step], None]) -> None:
    """What has come of it. Raises RuntimeError for a row that had to be given up."""
    for step in job.collect():
        if step.failed:
            raise RuntimeError(f"logits of slots {step.failed} of {job.model} are not finite")
        told(step)


class _Eager(TorchDevice):
    """Captures nothing: what would be a graph is launched kernel by kernel each time."""

    def capture(self, lane: Lane, work: Callable[[], None]) -> Callable[[], None]:
        return work


def _device(kind: str, wanted: PartitionName, eager: bool) -> tuple[Device, Partition, str]:
    if kind != "cuda":
        from muxserve.engine.cuda.green import GreenContexts
        from muxserve.engine.cuda.lanes import TimeSlices
        from tests.engine.cuda.fake_driver import FakeDriver
        from tests.engine.cuda.host_device import HostDevice

        driver = Driver(FakeDriver(), 0)
        lanes = GreenContexts(driver) if wanted == "green_contexts" else TimeSlices(driver)
        return HostDevice(), lanes, "no GPU"
    device = _Eager(0) if eager else TorchDevice(0)
    device.enter()
    partition, reason = open_partition(detect("cuda:0", probe(0), wanted), Driver.load(0))
    return device, partition, reason


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
