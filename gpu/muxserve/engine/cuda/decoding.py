"""`Decoding`: decode jobs on a GPU. Each step is a graph, and the next is launched before one is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from muxserve.engine.cuda.columns import Rectangle
from muxserve.engine.cuda.device import Device
from muxserve.engine.cuda.graphs import Graphs
from muxserve.engine.cuda.job import CudaJob
from muxserve.engine.cuda.model import CudaModel
from muxserve.engine.cuda.placing import Placing
from muxserve.engine.cuda.sampling import Reading, Rows, RowShape, Sampled, most_logprobs, to_step
from muxserve.engine.errors import JobError
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.triton.kernels import TritonKernels
from muxserve.engine.kernels.triton.language import next_power_of_2
from muxserve.engine.kernels.triton.scratch import Scratch
from muxserve.engine.messages import DecodeJob

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batches that graphs are made for; larger ones by powers of two."""

_AHEAD = 1
"""Steps that are launched beyond the one that is being read: the device is never without work. A batch whose
last row stops has computed so many for nothing."""

_SHORTEST = 256
"""Least context, in tokens, that a graph is made for."""


class Decoding:
    """Runs decode jobs of any model, one at a time, on one thread."""

    def __init__(self, device: Device, placing: Placing) -> None:
        self._device = device
        self._placing = placing
        self.graphs: Graphs[Sampled] = Graphs(device)
        self._scratch = Scratch(device.torch, self.graphs.clear)
        self.kernels = TritonKernels(self._scratch)
        self._blocks = Rectangle(device, self.graphs.clear)
        self._history = Rectangle(device, self.graphs.clear)
        self._make_room(64)

    def run(self, job: CudaJob, model: CudaModel, notify: Callable[[], None]) -> None:
        """Run a job to its end; `notify` is called when there is something to collect. Raises JobError,
        UnallocatedBlockError before anything is done, RuntimeError if the device fails."""
        message = job.message
        assert isinstance(message, DecodeJob)
        if not message.rows or not message.steps:
            return
        if any(row.start not in (-1, row.length - 1) for row in message.rows):
            raise JobError("a decode job on a GPU computes no prompts")
        wanted = [row.sampling for row in message.rows]
        slots, lengths, limits = np.array(
            [(row.slot, row.length, row.limit) for row in message.rows], dtype=np.int64
        ).T
        # KV of this many tokens is there at the last step, if no row ends before.
        held = np.maximum(lengths, np.minimum(lengths + message.steps - 1, limits - 1))
        model.check(slots, lengths - 1, lengths, np.maximum(lengths + 1, held))
        tokens = model.known(slots, lengths - 1, lengths)
        ids = model.block_ids(slots, held)

        if len(wanted) > self._rows.most:
            self._make_room(len(wanted))
        lane = self._placing.lane(job.shares)
        padded, longest = _padded(len(wanted)), max(_SHORTEST, next_power_of_2(int(held.max())))
        shape = self._rows.fill(lengths, limits, wanted, padded, tokens=tokens, positions=lengths - 1)
        cache = model.stage_blocks(self._blocks, lane, ids, padded, longest)
        history = None
        if shape.penalised:
            history = model.stage_history(self._history, lane, slots, padded, longest)
        self._rows.upload(lane)

        most = most_logprobs(wanted, model.spec.vocab_size)
        work = partial(self._step, model, shape, longest, cache, history)
        launched: deque[Reading] = deque()
        running = True

        def read() -> bool:
            """The oldest step that was launched; whether any row goes on after it."""
            reading = launched.popleft()
            outcome, found = reading.end()
            step = to_step(job.number, slots, lengths + job.steps, wanted, outcome, found)
            self._free.append(reading)
            if step is None:
                return False
            model.write_tokens(step.slots, step.positions, step.tokens)
            job.steps += 1
            job.deliver(step)
            notify()
            return not all(step.finished)

        try:
            for index in range(message.steps):
                if index and (job.stopped or not running):
                    break
                lane = self._placing.lane(job.shares)
                sampled = self.graphs.run(model.name, (shape, longest), lane, work)
                launched.append(self._free.pop())
                launched[-1].begin(lane, sampled, len(wanted), most)
                if len(launched) > _AHEAD:
                    running = read()
            while launched:
                read()
        finally:
            self._free += launched

    @torch.inference_mode()
    def _step(
        self, model: CudaModel, shape: RowShape, longest: int, cache: KVCache, history: Tensor | None
    ) -> Sampled:
        """One token of each row, which are then ready for the next."""
        count, rows = shape.rows, self._rows
        lengths, positions, tokens = (rows[name][:count] for name in ("lengths", "positions", "tokens"))
        slots = rows["slots"][:count]
        batch = RaggedBatch(
            slots=slots,
            query_starts=slots,
            context_lengths=lengths,
            positions=positions,
            token_slots=slots,
            max_query=1,
            max_context=longest,
        )
        decoder = model.decoders["decode"]
        with self._scratch.frame():
            logits = decoder.logits(decoder.forward(tokens, batch, cache))
            return rows.sample(shape, logits, history, self._scratch.new, moves=True)

    def _make_room(self, rows: int) -> None:
        """For so many of them. What was captured over less is void."""
        most = _padded(rows)
        self.graphs.clear()
        self._rows = Rows(self._device, most)
        self._free = [Reading(self._device, most) for _ in range(_AHEAD + 1)]


def _padded(rows: int) -> int:
    return next((size for size in _ROWS if size >= rows), next_power_of_2(rows))
