"""`Runner`: forward and sample, over memory that the worker owns. One per executor; knows no sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muxserve.engine.arena import SharedArena
from muxserve.engine.batches import decode_batch, prefill_batch
from muxserve.engine.kernels.cpu import CpuKernels
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.messages import UNFINISHED, AddModel, AttachArena, DecodeJob, PrefillJob, Step
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.sampler import SamplerError, SamplingBatch, sample
from muxserve.engine.shares import ThreadsPartition
from muxserve.engine.tables import TableViews
from muxserve.engine.weights import map_tensors


@dataclass(frozen=True, slots=True)
class MappedModel:
    """A model that jobs may name. tokens: int32 `[slots, context]`, the token table."""

    decoder: Decoder
    cache: KVCache
    tokens: Tensor


class Runner:
    """Runs jobs of any of its models; `attach` comes first.

    threads: most that a job will ask for.
    """

    device = "cpu"

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._partition = ThreadsPartition(torch.set_num_threads)
        self._models: dict[str, MappedModel] = {}
        self._arena: Tensor | None = None

    @property
    def partition(self) -> str:
        """How jobs get their share; kernels follow torch's number of threads."""
        return self._partition.name

    def attach(self, descriptor: AttachArena, fd: int) -> None:
        """Map the arena and get ready for the first job; closes `fd`. Raises ArenaError."""
        try:
            self._arena = SharedArena.attach(fd, descriptor).tensor()
        finally:
            os.close(fd)
        self._partition.apply(self._threads)

    def add(self, command: AddModel, *, weights_fd: int, tables_fd: int) -> None:
        """Map a model; closes both descriptors. A model of that name that is there is replaced."""
        assert self._arena is not None
        try:
            weights = map_tensors(weights_fd, command.weights)
            views = TableViews.attach(tables_fd, command.layout, command.slots, command.context)
        finally:
            os.close(weights_fd)
            os.close(tables_fd)
        blocks, tokens = views.torch_views()
        cache = KVCache.over(self._arena, blocks, command.layout)
        self._models[command.model] = MappedModel(Decoder(command.spec, weights, CpuKernels()), cache, tokens)

    def remove(self, model: str) -> None:
        """Let go of a model's memory. Unknown names are ignored."""
        self._models.pop(model, None)

    @torch.inference_mode()
    def prefill(self, job: PrefillJob) -> Step | None:
        """Write the chunks' KV; sample a token for each chunk that ends its sequence's known tokens.

        None if no chunk does. Raises KeyError for an unknown model, and what the kernels raise.
        """
        model = self._models[job.model]
        self._partition.apply(job.threads)
        batch = prefill_batch(job.chunks)
        tokens = model.tokens[batch.token_slots, batch.positions].long()
        hidden = model.decoder.forward(tokens, batch, model.cache)
        ending = [(row, c) for row, c in enumerate(job.chunks) if c.sampling is not None]
        if not ending:
            return None
        rows = torch.tensor([row for row, _ in ending])
        logits = model.decoder.logits(hidden[batch.query_starts[rows + 1] - 1])
        sampling = SamplingBatch.build(
            [c.sampling for _, c in ending if c.sampling is not None],
            slots=[c.slot for _, c in ending],
            limits=[c.limit for _, c in ending],
        )
        return _sample(job.job, model, logits, _Rows(sampling, batch.context_lengths[rows]))[0]

    @torch.inference_mode()
    def decode(self, job: DecodeJob) -> Iterator[Step]:
        """Up to `job.steps` steps; fewer if all rows finish. Raises as `prefill` does."""
        model = self._models[job.model]
        self._partition.apply(job.threads)
        sampling = SamplingBatch.build(
            [row.sampling for row in job.rows],
            slots=[row.slot for row in job.rows],
            limits=[row.limit for row in job.rows],
        )
        rows = _Rows(sampling, torch.tensor([row.length for row in job.rows]))
        for _ in range(job.steps):
            batch = decode_batch(rows.sampling.slots, rows.lengths)
            tokens = model.tokens[batch.slots, batch.positions].long()
            hidden = model.decoder.forward(tokens, batch, model.cache)
            step, rows = _sample(job.job, model, model.decoder.logits(hidden), rows)
            yield step
            if not len(rows.lengths):
                return


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sequences that go on. lengths: int64 `[R]`, tokens known of each."""

    sampling: SamplingBatch
    lengths: Tensor

    def select(self, keep: Tensor) -> _Rows:
        """Those for which `keep`, bool `[R]`, is true."""
        return _Rows(self.sampling.select(keep), self.lengths[keep])


def _sample(job: int, model: MappedModel, logits: Tensor, rows: _Rows) -> tuple[Step, _Rows]:
    """Choose the next token of each row and write it to the token table; the step, and the rows that go on.

    Rows whose logits are not finite leave, and the others do not notice.
    """
    failed: tuple[int, ...] = ()
    try:
        sampled = sample(logits, rows.sampling, rows.lengths, model.tokens)
    except SamplerError as error:
        keep = torch.ones(len(rows.lengths), dtype=torch.bool)
        keep[list(error.rows)] = False
        failed = tuple(rows.sampling.slots[~keep].tolist())
        rows, logits = rows.select(keep), logits[keep]
        if not len(rows.lengths):
            return Step(job, (), (), (), (), failed=failed), rows
        sampled = sample(logits, rows.sampling, rows.lengths, model.tokens)
    slots, positions = rows.sampling.slots, rows.lengths
    model.tokens[slots, positions] = sampled.tokens.int()
    step = Step(
        job,
        tuple(slots.tolist()),
        tuple(positions.tolist()),
        tuple(sampled.tokens.tolist()),
        tuple(sampled.finished.tolist()),
        sampled.logprobs,
        failed,
    )
    going = sampled.finished == UNFINISHED
    after = _Rows(rows.sampling, positions + 1)
    return step, after if bool(going.all()) else after.select(going)
