"""A rank's process for tests: what an executor of a mesh does, on the reference kernels, on CPU.

Arena, weights and tables come from the test as from a worker, by descriptor; jobs come to rank 0 alone. Each
kind of job has a lane: a thread, and collectives of its own.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from muxserve.engine.arena import SharedArena
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.reference import ReferenceKernels
from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import (
    UNFINISHED,
    AddModel,
    AttachArena,
    Command,
    DecodeJob,
    EndLease,
    JobDone,
    ModelAdded,
    PrefillJob,
    Ready,
    Step,
)
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.parallel.control import Follower, Leader
from muxserve.engine.parallel.decoder import parallel_decoder
from muxserve.engine.parallel.errors import MeshBroken
from muxserve.engine.parallel.group import Collectives, join, leave
from muxserve.engine.parallel.shard import Shard
from muxserve.engine.parallel.steps import Advance, LeadingSteps, Steps
from muxserve.engine.sampler import SamplingBatch, sample
from muxserve.engine.tables import TableViews
from muxserve.engine.weights import map_tensors

Told = PrefillJob | DecodeJob | Advance
BROKEN = 3
"""Exit code after MeshBroken."""
NO_JOB = -1


@dataclass(frozen=True, slots=True)
class Model:
    """decoders: of the prefill lane and of the decode lane."""

    decoders: tuple[Decoder, Decoder]
    cache: KVCache
    tables: TableViews
    tokens: Tensor


class Rank:
    """Serves until the worker's link closes."""

    def __init__(
        self,
        worker: Link[Command],
        control: Leader | Follower[Told],
        lanes: Sequence[Collectives],
        arena: Tensor,
    ) -> None:
        self._worker = worker
        self._control = control
        self._lanes = lanes
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._sending = threading.Lock()
        self._arena = arena
        self._models: dict[str, Model] = {}
        self._steps: dict[int, Steps] = {}

    def run(self) -> None:
        poller = select.poll()
        poller.register(self._worker, select.POLLIN)
        follower = self._control if isinstance(self._control, Follower) else None
        for descriptor in [follower.fileno()] if follower else self._control.filenos():  # type: ignore[union-attr]
            poller.register(descriptor, select.POLLIN)
        while True:
            for ready, _ in poller.poll():
                if ready == self._worker.fileno():
                    while (received := self._worker.try_receive()) is not None:
                        self._take(*received)
                elif follower:
                    while (told := follower.try_receive()) is not None:
                        self._follow(told)
                else:
                    self._control.check()  # type: ignore[union-attr]

    def _take(self, command: Command, descriptors: list[int]) -> None:
        match command:
            case AddModel():
                self._add(command, *descriptors)
                self._send(ModelAdded(command.model))
            case PrefillJob() | DecodeJob():
                assert isinstance(self._control, Leader), "followers get no jobs from the worker"
                if isinstance(command, DecodeJob):
                    steps = LeadingSteps(command.job, command.steps, self._control.tell)
                    self._steps[command.job] = steps
                self._control.tell(command)
                self._start(command)
            case EndLease():
                steps_of = self._steps[command.job]
                assert isinstance(steps_of, LeadingSteps)
                steps_of.stop()

    def _follow(self, told: Told) -> None:
        if isinstance(told, Advance):
            self._steps[told.job].grant(told)
            return
        if isinstance(told, DecodeJob):
            self._steps[told.job] = Steps(told.steps)
        self._start(told)

    def _add(self, command: AddModel, weights_fd: int, tables_fd: int) -> None:
        shard = Shard(command.spec, self._lanes[0].rank, self._lanes[0].ranks)
        weights = map_tensors(weights_fd, command.weights)
        tables = TableViews.attach(tables_fd, command.layout, command.slots, command.context)
        os.close(weights_fd)
        os.close(tables_fd)
        blocks, tokens = tables.torch_views()
        kernels = ReferenceKernels()
        prefill, decode = (parallel_decoder(shard, weights, kernels, lane) for lane in self._lanes)
        cache = KVCache.over(self._arena, blocks, command.layout)
        self._models[command.model] = Model((prefill, decode), cache, tables, tokens)

    def _start(self, job: PrefillJob | DecodeJob) -> None:
        lane = int(isinstance(job, DecodeJob))
        self._threads[lane].submit(self._run, job)

    def _run(self, job: PrefillJob | DecodeJob) -> None:
        try:
            model = self._models[job.model]
            steps = self._prefill(model, job) if isinstance(job, PrefillJob) else self._decode(model, job)
            self._send(JobDone(job.job, steps, 0.0))
        except Exception as error:
            self.end(error, job.job)

    def end(self, error: Exception, job: int = NO_JOB) -> None:
        """What a rank does when it cannot go on: say so, and end."""
        self._send(JobDone(job, 0, 0.0, f"{type(error).__name__}: {error}"))
        os._exit(BROKEN if isinstance(error, MeshBroken) else 1)

    def _prefill(self, model: Model, job: PrefillJob) -> int:
        pieces = [(chunk.slot, chunk.start, chunk.end) for chunk in job.chunks]
        tokens = torch.cat([model.tokens[slot, start:end] for slot, start, end in pieces]).long()
        batch = ragged(pieces)
        hidden = model.decoders[0].forward(tokens, batch, model.cache)
        last = [i for i, chunk in enumerate(job.chunks) if chunk.sampling is not None]
        if last:
            logits = model.decoders[0].logits(hidden[batch.query_starts[1:][last] - 1])
            sampling = SamplingBatch.build(
                [chunk.sampling for chunk in job.chunks if chunk.sampling is not None],
                slots=[job.chunks[i].slot for i in last],
                limits=[job.chunks[i].limit for i in last],
            )
            self._choose(model, job.job, logits, sampling, batch.context_lengths[last])
        return 1

    def _decode(self, model: Model, job: DecodeJob) -> int:
        done = 0
        lengths = torch.tensor([row.length for row in job.rows])
        sampling = SamplingBatch.build(
            [row.sampling for row in job.rows],
            slots=[row.slot for row in job.rows],
            limits=[row.limit for row in job.rows],
        )
        tokens = model.tokens[sampling.slots, lengths - 1].long()
        for _ in self._steps[job.job]:
            ends = lengths.tolist()
            batch = ragged([(s, end - 1, end) for s, end in zip(sampling.slots.tolist(), ends, strict=True)])
            logits = model.decoders[1].logits(model.decoders[1].forward(tokens, batch, model.cache))
            tokens, going = self._choose(model, job.job, logits, sampling, lengths)
            done += 1
            tokens, lengths, sampling = tokens[going], lengths[going] + 1, sampling.select(going)
            if not len(tokens):
                break
        return done

    def _choose(
        self, model: Model, job: int, logits: Tensor, batch: SamplingBatch, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sampled tokens, and which rows go on. Rank 0 alone writes them to the table: the worker hears of
        them from it, and might have given the slot away when another rank's come."""
        chosen = sample(logits, batch, positions, model.tokens)
        if isinstance(self._control, Leader):
            model.tokens[batch.slots, positions] = chosen.tokens.int()
        columns = (batch.slots, positions, chosen.tokens, chosen.finished)
        self._send(Step(job, *(tuple(column.tolist()) for column in columns)))
        return chosen.tokens, chosen.finished == UNFINISHED

    def _send(self, report: Ready | ModelAdded | Step | JobDone) -> None:
        with self._sending:
            self._worker.send(report)


def ragged(pieces: Sequence[tuple[int, int, int]]) -> RaggedBatch:
    """Tokens `[begin, end)` of each (slot, begin, end)."""
    slots, begins, ends = torch.tensor(pieces).unbind(1)
    counts = ends - begins
    return RaggedBatch(
        slots=slots,
        query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        context_lengths=ends,
        positions=torch.cat([torch.arange(begin, end) for _, begin, end in pieces]),
        token_slots=slots.repeat_interleave(counts),
        max_query=int(counts.max()),
        max_context=int(ends.max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting", type=int)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--control", type=int, nargs="*")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--timeout", type=float)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worker: Link[Command] = Link(socket.socket(fileno=options.worker), Command)
    ready = Ready(os.getpid(), "cpu", "none")
    worker.send(ready)
    command, (arena_fd,) = worker.receive()
    assert isinstance(command, AttachArena)
    arena = SharedArena.attach(arena_fd, command)
    lanes = join(options.rank, options.ranks, options.meeting, torch.device("cpu"), timeout=options.timeout)
    worker.send(ready)
    sockets = [socket.socket(fileno=descriptor) for descriptor in options.control]
    control = Follower[Told](sockets[0], Told) if options.rank else Leader(sockets, options.timeout)
    rank = Rank(worker, control, lanes, torch.from_numpy(arena.data))
    try:
        rank.run()
    except LinkClosed:
        leave()
        os._exit(0)
    except MeshBroken as error:
        rank.end(error)


if __name__ == "__main__":
    main()
