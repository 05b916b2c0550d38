"""Rows of which a token is sampled: what the device is told of them, and what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.cuda.columns import Columns
from muxserve.engine.cuda.device import Device, Event
from muxserve.engine.cuda.lanes import Lane
from muxserve.engine.errors import JobError
from muxserve.engine.kernels.triton.advance import ABSENT, BAD_SHIFT, FINISHED_SHIFT, advance
from muxserve.engine.kernels.triton.language import New, next_power_of_2
from muxserve.engine.kernels.triton.sample import logprobs, sample
from muxserve.engine.messages import Sampling, Step, TokenLogprobs
from muxserve.engine.sampler import GREEDY_BELOW, SamplingBatch

Integers = NDArray[np.int64]

MOST_STOPS = 128
"""Stop ids of a row."""

_GREEDY = Sampling(temperature=0.0)

_COLUMNS = {
    **dict.fromkeys(
        ("lengths", "positions", "tokens", "limits", "seeds", "top_k", "prompt_lengths", "slots", "places"),
        torch.int64,
    ),
    **dict.fromkeys(("temperature", "min_p", "repetition", "presence", "frequency"), torch.float32),
    "top_p": torch.float64,
}
_PARAMETERS = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    **{name: f"{name}_penalty" for name in ("repetition", "presence", "frequency")},
    "prompt_lengths": "prompt_length",
}
"""Columns that are `Sampling`'s."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a graph over rows depends on. rows: padded; stops: ids of each row, padded; random, penalised:
    whether any row is."""

    rows: int
    stops: int
    random: bool
    penalised: bool


class Rows:
    """Columns for up to `most` rows. `tokens` is each row's last known one and `positions` its position;
    `places` is for what else a pass wants to know of a row."""

    def __init__(self, device: Device, most: int) -> None:
        self.most = most
        counts = dict.fromkeys(_COLUMNS, most) | {"stop_ids": most * MOST_STOPS}
        types = {**_COLUMNS, "stop_ids": torch.int64}
        self._columns = Columns(device, {name: (types[name], count) for name, count in counts.items()})
        self._no_history = torch.zeros((1, 1), dtype=torch.int32, device=device.torch)

    def __getitem__(self, name: str) -> Tensor:
        """The column on the device."""
        return self._columns[name]

    def fill(
        self, lengths: Integers, limits: Integers, wanted: Sequence[Sampling], padded: int, **others: Integers
    ) -> RowShape:
        """Fill in n rows, and `padded - n` of length 0, for the next `upload`. lengths: known tokens, int64
        `[n]`; others: columns of int64 `[n]`. Raises JobError."""
        count = len(wanted)
        host = self._columns.host()
        for name in _COLUMNS:
            host[name][:padded] = 0
        host["positions"][:padded] = -1
        host["slots"][:padded] = np.arange(padded)
        host["limits"][:padded] = 1 << 62
        for name, values in {"lengths": lengths, "limits": limits, **others}.items():
            host[name][:count] = values
        for name, parameter in _PARAMETERS.items():
            host[name][:count] = [getattr(one, parameter) for one in wanted]
        host["seeds"].view(np.uint64)[:count] = [one.seed & (1 << 64) - 1 for one in wanted]
        most_stops = max(len(one.stop_token_ids) for one in wanted)
        if most_stops > MOST_STOPS:
            raise JobError(f"stop_token_ids: there are {most_stops}; at most {MOST_STOPS}")
        stops = max(4, next_power_of_2(most_stops)) if most_stops else 0
        ids = host["stop_ids"][: padded * stops].reshape(padded, stops)
        ids.fill(-1)
        for row, one in zip(ids, wanted, strict=False):
            row[: len(one.stop_token_ids)] = one.stop_token_ids
        host["repetition"][count:padded] = 1
        host["top_p"][count:padded] = 1
        penalised = bool(
            (host["repetition"][:count] != 1).any()
            or host["presence"][:count].any()
            or host["frequency"][:count].any()
        )
        return RowShape(padded, stops, bool((host["temperature"][:count] >= GREEDY_BELOW).any()), penalised)

    def upload(self, lane: Lane) -> None:
        """Begin to copy what was filled in."""
        self._columns.upload(lane)

    def sample(
        self, shape: RowShape, logits: Tensor, history: Tensor | None, new: New, *, moves: bool
    ) -> Sampled:
        """Put the sampling of a token for each row on the current lane. logits: float32 `[R, V]`; history:
        int32 `[R, context]`, where rows are penalised. moves: rows are then ready for their next token."""
        lengths, positions, tokens = (self[name][: shape.rows] for name in ("lengths", "positions", "tokens"))
        known = self._no_history if history is None else history
        found = sample(logits, self._batch(shape), lengths, known, new=new)
        outcome = new((shape.rows,), dtype=torch.int64, device=logits.device)
        if moves:
            advance(found, outcome, lengths, positions, tokens, history)
        else:
            advance(found, outcome)
        return Sampled(logits, found.tokens, outcome)

    def _batch(self, shape: RowShape) -> SamplingBatch:
        of = {name: self._columns[name][: shape.rows] for name in _COLUMNS}
        none = of["slots"][:0]
        return SamplingBatch(
            parameters=(),
            random=shape.random,
            slots=of["slots"],
            limits=of["limits"],
            stop_ids=self._columns["stop_ids"][: shape.rows * shape.stops].view(shape.rows, shape.stops),
            seeds=of["seeds"],
            temperature=of["temperature"],
            top_k=of["top_k"],
            top_p=of["top_p"],
            min_p=of["min_p"],
            repetition=of["repetition"],
            presence=of["presence"],
            frequency=of["frequency"],
            prompt_lengths=of["prompt_lengths"],
            penalised=of["slots"] if shape.penalised else none,
            unfiltered=none,
            with_top_k=none,
            with_top_p=none,
            with_logprobs=none,
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a pass leaves on the device. logits: float32 `[R, V]`; tokens: int64 `[R]`; outcome: int64 `[R]`,
    see `kernels.triton.advance`."""

    logits: Tensor
    tokens: Tensor
    outcome: Tensor


class Reading:
    """A step's results on their way to the host. Its memory is used again for a later step."""

    def __init__(self, device: Device, most: int) -> None:
        self._device = device
        self._outcome = device.pinned(8 * most).view(torch.int64)
        self._event: Event = device.event()
        self._logprobs: tuple[Tensor, Tensor, Tensor] | None = None
        self._rows = 0

    def begin(self, lane: Lane, sampled: Sampled, rows: int, most: int) -> None:
        """Put the copies on the lane. most: see `most_logprobs`."""
        self._rows = rows
        with self._device.on(lane), torch.inference_mode():
            self._outcome[:rows].copy_(sampled.outcome[:rows], non_blocking=True)
            self._logprobs = None
            if most >= 0:
                found = logprobs(sampled.logits[:rows], sampled.tokens[:rows], most)
                # By way of pageable memory: few ask, and that copy is done when the call returns.
                self._logprobs = (found.chosen.cpu(), found.top_ids.cpu(), found.top.cpu())
        self._event.record(lane)

    def end(self) -> tuple[Integers, tuple[Tensor, Tensor, Tensor] | None]:
        """Wait for them: outcomes, int64 `[rows]`, to be read at once, and log-probabilities."""
        self._event.wait()
        return self._outcome[: self._rows].numpy(), self._logprobs


def most_logprobs(wanted: Sequence[Sampling], vocabulary: int) -> int:
    """That any row wants, -1 = none does."""
    return min(max(one.logprobs for one in wanted), vocabulary)


def to_step(
    job: int,
    slots: Integers,
    positions: Integers,
    wanted: Sequence[Sampling],
    outcome: Integers,
    found: tuple[Tensor, Tensor, Tensor] | None,
) -> Step | None:
    """The message that tells of a step; None if no row was in it. All arrays are int64 `[rows]`."""
    failed = (outcome != ABSENT) & (outcome >> BAD_SHIFT & 1 == 1)
    chosen = (outcome != ABSENT) & ~failed
    if not chosen.any() and not failed.any():
        return None
    kept = outcome[chosen]
    return Step(
        job,
        tuple(slots[chosen].tolist()),
        tuple(positions[chosen].tolist()),
        tuple((kept & 0xFFFFFFFF).tolist()),
        tuple((kept >> FINISHED_SHIFT & 0xFF).tolist()),
        () if found is None else _logprobs(wanted, chosen, *found),
        tuple(slots[failed].tolist()),
    )


def _logprobs(
    wanted: Sequence[Sampling], chosen: NDArray[Any], own: Tensor, ids: Tensor, top: Tensor
) -> tuple[TokenLogprobs | None, ...]:
    told: list[TokenLogprobs | None] = []
    for row in np.flatnonzero(chosen).tolist():
        count = wanted[row].logprobs
        told.append(
            None
            if count < 0
            else TokenLogprobs(
                float(own[row]), tuple(ids[row, :count].tolist()), tuple(top[row, :count].tolist())
            )
        )
    return tuple(told)
