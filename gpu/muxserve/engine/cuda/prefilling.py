"""`Prefilling`: prefill jobs on a GPU, in passes over the tokens of several prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.cuda.columns import Columns, Rectangle
from muxserve.engine.cuda.device import Device
from muxserve.engine.cuda.graphs import Graphs
from muxserve.engine.cuda.job import CudaJob
from muxserve.engine.cuda.model import CudaModel
from muxserve.engine.cuda.placing import Placing
from muxserve.engine.cuda.sampling import Reading, Rows, RowShape, Sampled, most_logprobs, to_step
from muxserve.engine.kernels.interface import KVCache, RaggedBatch
from muxserve.engine.kernels.triton.kernels import TritonKernels
from muxserve.engine.kernels.triton.language import next_power_of_2
from muxserve.engine.kernels.triton.scratch import Scratch
from muxserve.engine.messages import PrefillChunk, PrefillJob

Integers = NDArray[np.int64]

_TOKENS = 4096
"""Of a pass: enough to fill the device's matrix units, and not so many that what lies between a model's
products takes gigabytes."""

_SEQUENCES = 64
"""Of a pass: the logits of each that is sampled take memory."""

_SHORT = 256
"""Passes of at most so many tokens are graphs, padded: computing them takes less time than launching them
one kernel after another does."""


@dataclass(slots=True)
class _Pass:
    """Chunks, or parts of them: rows of the job, and of each the tokens `[begins, ends)`."""

    rows: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph of a pass depends on. sampled: None if no row is."""

    tokens: int
    sequences: int
    longest: int
    sampled: RowShape | None


class Prefilling:
    """Runs prefill jobs of any model, one at a time, on one thread."""

    def __init__(self, device: Device, placing: Placing) -> None:
        self._device = device
        self._placing = placing
        self.graphs: Graphs[Sampled | None] = Graphs(device)
        self._scratch = Scratch(device.torch, self.graphs.clear)
        self.kernels = TritonKernels(self._scratch)
        self._blocks = Rectangle(device, self.graphs.clear)
        self._history = Rectangle(device, self.graphs.clear)
        self._rows = Rows(device, _SEQUENCES)
        self._reading = Reading(device, _SEQUENCES)
        per_token = dict.fromkeys(("tokens", "positions", "token_slots"), (torch.int64, _TOKENS))
        per_sequence = {"starts": (torch.int64, _SEQUENCES + 1), "contexts": (torch.int64, _SEQUENCES)}
        self._columns = Columns(device, {**per_token, **per_sequence})
        self._slots = torch.arange(_SEQUENCES, device=device.torch)

    def run(self, job: CudaJob, model: CudaModel, notify: Callable[[], None]) -> None:
        """Run a job to its end; `notify` is called when there is something to collect. Raises JobError,
        UnallocatedBlockError before anything is done, RuntimeError if the device fails."""
        message = job.message
        assert isinstance(message, PrefillJob)
        chunks = message.chunks
        slots, begins, ends = (
            np.array([(c.slot, c.start, c.end) for c in chunks], dtype=np.int64).reshape(-1, 3).T
        )
        sampled = np.array([c.sampling is not None for c in chunks], dtype=np.int64)
        model.check(slots, begins, ends, ends + sampled)
        known, ids = model.known(slots, begins, ends), model.block_ids(slots, ends)
        done = 0
        for each in _passes(chunks):
            if job.stopped:
                return
            tokens = known[done : done + each.tokens]  # passes take them in the same order
            self._pass(job, model, each, tokens, ids[:, each.rows], notify)
            done += each.tokens
        job.steps = 1

    def _pass(
        self,
        job: CudaJob,
        model: CudaModel,
        each: _Pass,
        known: Integers,
        ids: NDArray[np.int32],
        notify: Callable[[], None],
    ) -> None:
        """known: the pass's tokens; ids: block ids of its rows."""
        message = job.message
        assert isinstance(message, PrefillJob)
        chunks = [message.chunks[row] for row in each.rows]
        slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        begins, ends = np.array(each.begins, dtype=np.int64), np.array(each.ends, dtype=np.int64)
        tokens, sequences, longest = each.tokens, len(chunks), int(ends.max())
        graphed = tokens <= _SHORT
        if graphed:
            tokens, sequences, longest = (
                max(least, next_power_of_2(size))
                for least, size in ((16, tokens), (1, sequences), (_SHORT, longest))
            )
        lane = self._placing.lane(job.shares)
        self._fill(known, begins, ends, tokens, sequences)
        ids = ids[..., : model.layout.spans(int(ends.max()))]
        cache = model.stage_blocks(self._blocks, lane, ids, sequences, longest)
        self._columns.upload(lane)

        last = np.cumsum(ends - begins) - 1
        told = [
            (i, chunk, chunk.sampling)
            for i, (chunk, end) in enumerate(zip(chunks, each.ends, strict=True))
            if chunk.sampling is not None and chunk.end == end
        ]
        rows, history = None, None
        which = np.array([i for i, _, _ in told], dtype=np.int64)
        wanted = [sampling for _, _, sampling in told]
        if told:
            limits = np.array([chunk.limit for _, chunk, _ in told], dtype=np.int64)
            padded = next_power_of_2(len(told)) if graphed else len(told)
            rows = self._rows.fill(ends[which], limits, wanted, padded, places=last[which])
            if rows.penalised:
                history = model.stage_history(self._history, lane, slots[which], padded, longest)
            self._rows.upload(lane)

        shape = _Shape(tokens, sequences, longest, rows)
        work = partial(self._forward, model, shape, cache, history)
        if graphed:
            sampled = self.graphs.run(model.name, shape, lane, work)
        else:
            with self._device.on(lane):
                sampled = work()
        if sampled is None:
            return
        self._reading.begin(lane, sampled, len(told), most_logprobs(wanted, model.spec.vocab_size))
        step = to_step(job.number, slots[which], ends[which], wanted, *self._reading.end())
        assert step is not None
        model.write_tokens(step.slots, step.positions, step.tokens)
        job.deliver(step)
        notify()

    @torch.inference_mode()
    def _forward(
        self, model: CudaModel, shape: _Shape, cache: KVCache, history: Tensor | None
    ) -> Sampled | None:
        """The pass; a token of each row that is sampled."""
        columns, rows, new = self._columns, self._rows, self._scratch.new
        batch = RaggedBatch(
            slots=self._slots[: shape.sequences],
            query_starts=columns["starts"][: shape.sequences + 1],
            context_lengths=columns["contexts"][: shape.sequences],
            positions=columns["positions"][: shape.tokens],
            token_slots=columns["token_slots"][: shape.tokens],
            max_query=shape.tokens + 1,  # never one each: a decode kernel is for batches without padding
            max_context=shape.longest,
        )
        decoder = model.decoders["prefill"]
        with self._scratch.frame():
            hidden = decoder.forward(columns["tokens"][: shape.tokens], batch, cache)
            if shape.sampled is None:
                return None
            count = shape.sampled.rows
            picked = new((count, hidden.shape[1]), dtype=hidden.dtype)
            torch.index_select(hidden, 0, rows["places"][:count], out=picked)
            logits = decoder.logits(picked)
            return rows.sample(shape.sampled, logits, history, new, moves=False)

    def _fill(self, known: Integers, begins: Integers, ends: Integers, tokens: int, sequences: int) -> None:
        """Columns of a pass, padded to `tokens` and `sequences`. known: its tokens."""
        host, counts = self._columns.host(), ends - begins
        starts = np.concatenate([[0], np.cumsum(counts)])
        used, rows = len(known), len(counts)
        host["tokens"][:used], host["tokens"][used:tokens] = known, 0
        host["positions"][:used] = np.arange(used) + np.repeat(begins - starts[:-1], counts)
        host["positions"][used:tokens] = -1
        host["token_slots"][:used], host["token_slots"][used:tokens] = np.repeat(np.arange(rows), counts), 0
        host["starts"][: rows + 1], host["starts"][rows + 1 : sequences + 1] = starts, used
        host["contexts"][:rows], host["contexts"][rows:sequences] = ends, 0


def _passes(chunks: tuple[PrefillChunk, ...]) -> Iterator[_Pass]:
    """The chunks in their order, cut where a pass is full."""
    found = _Pass()
    for row, chunk in enumerate(chunks):
        begin = chunk.start
        while begin < chunk.end:
            end = min(chunk.end, begin + _TOKENS - found.tokens)
            found.rows.append(row)
            found.begins.append(begin)
            found.ends.append(end)
            found.tokens += end - begin
            begin = end
            if found.tokens == _TOKENS or len(found.rows) == _SEQUENCES:
                yield found
                found = _Pass()
    if found.rows:
        yield found
