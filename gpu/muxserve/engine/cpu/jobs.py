"""`NativeJob`: a job in the native library's terms, and its results in ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.cpu.library import ABSENT, NO_BLOCK, NO_TOKEN, NOT_FINITE, PARTS, SAMPLING, Job
from muxserve.engine.cpu.model import NativeModel
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.messages import DecodeJob, DecodeRow, PrefillJob, Sampling, Shares, Step, TokenLogprobs
from muxserve.engine.shares import split_cores

Array = NDArray[Any]


_LONGEST_HOLD, _HOLD_PER_ROW = 0.05, 0.0015
"""Seconds that steps of many rows may wait for the next ones, so that telling of them costs less: well
below what the worker's pacer holds their tokens back anyway. A lone row's never wait."""


class NativeJob:
    """Memory of one job, in and out; must live until the library has ended it.

    rows are those of the message. `collect` gives the steps that have come since it was last called.
    cores: all there are, for this job and one of the other kind.
    """

    def __init__(self, message: PrefillJob | DecodeJob, model: NativeModel, cores: int) -> None:
        self.number = message.job
        self.model = message.model
        self._native_model = model
        self._cores = cores
        self._kind = 0 if isinstance(message, PrefillJob) else 1
        if isinstance(message, PrefillJob):
            rows = [(c.slot, c.start, c.end, c.limit) for c in message.chunks]
            wanted = [c.sampling for c in message.chunks]
            steps = 1
        else:
            rows = [(r.slot, _start(r), r.length, r.limit) for r in message.rows]
            wanted = [r.sampling for r in message.rows]
            steps = message.steps
        # One column after another: each is an array of its own to the library.
        self._places = np.array(rows, dtype=np.int64).reshape(-1, 4).T.copy()
        self._samples = np.array([sampling is not None for sampling in wanted], dtype=np.uint8)
        self._sampling, self._stops = _sampling([sampling or _GREEDY for sampling in wanted])
        logprobs = max((s.logprobs for s in wanted if s is not None), default=-1)
        shape = (steps, len(rows))
        self._tokens = np.zeros(shape, np.int32)
        self._finished = np.full(shape, ABSENT, np.int8)
        width = 1 + max(logprobs, 0) if logprobs >= 0 else 0
        self._logprob = np.zeros((*shape, width), np.float32)
        self._logprob_ids = np.zeros((*shape, width), np.int32)
        self._wanted = [s.logprobs if s is not None else -1 for s in wanted]
        self._positions = self._places[2].copy()
        self._collected = 0
        self.struct = Job(
            model=ctypes.addressof(model.struct),
            rows=len(rows),
            steps=steps,
            **{name: self._places[i].ctypes.data for i, name in enumerate(("slot", "begin", "end", "limit"))},
            samples=self._samples.ctypes.data,
            sampling=self._sampling.ctypes.data,
            logprobs=max(logprobs, 0),
            hold=min(_LONGEST_HOLD, _HOLD_PER_ROW * (len(rows) - 1)),
            lead=message.lead if isinstance(message, PrefillJob) else 0.0,
            tokens=self._tokens.ctypes.data,
            finished=self._finished.ctypes.data,
            logprob=self._logprob.ctypes.data,
            logprob_ids=self._logprob_ids.ctypes.data,
            threads=self._threads(message.shares),
        )

    @property
    def ended(self) -> bool:
        """The library is done with it; there may be steps left to collect."""
        return bool(self.struct.ended)

    @property
    def nears_end(self) -> bool:
        """See `RunningJob.nears_end`."""
        return bool(self.struct.nears_end)

    @property
    def steps(self) -> int:
        """Steps computed so far."""
        return int(self.struct.done)

    @property
    def seconds(self) -> float:
        """How long it took, once it has ended."""
        return float(self.struct.seconds)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that went into each of `PARTS` so far."""
        return dict(zip(PARTS, self.struct.parts, strict=True))

    @property
    def error(self) -> Exception | None:
        """Why it ended early, if it did so for a fault."""
        if not self.struct.failure:
            return None
        if self.struct.failure == NO_BLOCK:
            return UnallocatedBlockError(self.struct.failed_layer)
        if self.struct.failure == NO_TOKEN:
            vocab = self._native_model.spec.vocab_size
            return JobError(f'a known token is not one of the {vocab} of model "{self.model}"')
        return JobError(f'model "{self.model}" has no such slot or position')

    def stop(self) -> None:
        """End after the step that runs."""
        self.struct.stop = 1

    def use_shares(self, shares: Shares) -> None:
        """From the next step (decode) or layer (prefill) on."""
        self.struct.threads = self._threads(shares)

    def collect(self) -> list[Step]:
        """Steps that were computed since the last call."""
        done = self.steps
        steps = [self._step(i) for i in range(self._collected, done)]
        self._collected = done
        return [step for step in steps if step is not None]

    def _threads(self, shares: Shares) -> int:
        return (
            split_cores(self._cores, shares.prefill, shares.decode, shares.decoding)[self._kind]
            or self._cores
        )

    def _step(self, index: int) -> Step | None:
        finished = self._finished[index]
        slots = self._places[0]
        chosen = finished != ABSENT
        failed: tuple[int, ...] = ()
        if not chosen.all() or (finished == NOT_FINITE).any():
            broken = finished == NOT_FINITE
            failed = tuple(slots[broken].tolist())
            chosen &= ~broken
            if not chosen.any() and not failed:
                return None
            slots, finished = slots[chosen], finished[chosen]
            positions, tokens = self._positions[chosen], self._tokens[index][chosen]
        else:
            positions, tokens = self._positions, self._tokens[index]
        step = Step(
            self.number,
            tuple(slots.tolist()),
            tuple(positions.tolist()),
            tuple(tokens.tolist()),
            tuple(finished.tolist()),
            self._logprobs(index, chosen) if self._logprob.shape[2] else (),
            failed,
        )
        self._positions += 1
        return step

    def _logprobs(self, index: int, chosen: Array) -> tuple[TokenLogprobs | None, ...]:
        found: list[TokenLogprobs | None] = []
        for row in np.flatnonzero(chosen).tolist():
            count = min(self._wanted[row], self._native_model.spec.vocab_size)
            values, ids = self._logprob[index, row], self._logprob_ids[index, row]
            top = slice(1, 1 + count)
            found.append(
                TokenLogprobs(float(values[0]), tuple(ids[top].tolist()), tuple(values[top].tolist()))
                if count >= 0
                else None
            )
        return tuple(found)


def _start(row: DecodeRow) -> int:
    """The first token that the row's first step computes."""
    return row.length - 1 if row.start == -1 else row.start


_GREEDY = Sampling(temperature=0.0)


def _sampling(rows: Sequence[Sampling]) -> tuple[Array, Array]:
    """The rows' parameters, and the memory of all stop ids that these point into."""
    stops = np.array([i for row in rows for i in row.stop_token_ids], dtype=np.int32)
    at = stops.ctypes.data
    values = []
    for row in rows:
        values.append(
            (
                *(row.temperature, row.min_p, row.repetition_penalty, row.presence_penalty),
                *(row.frequency_penalty, row.top_k, row.logprobs, len(row.stop_token_ids), at),
                *(row.top_p, row.seed & (1 << 64) - 1, row.prompt_length),
            )
        )
        at += len(row.stop_token_ids) * stops.itemsize
    return np.array(values, dtype=SAMPLING), stops
