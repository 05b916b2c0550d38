"""What a unit can serve under this project's scheduler, in closed form: what `best` searches with.

Equation 3 does not know that decode jobs of a unit's models take turns, that a prefill beside them slows
them down, or that batches grow with load. Here the unit is taken as it works: every model decodes one step
per turn, so that a token takes a turn's time C; by Little's law B_m = rate_m · output_m · C sequences of a
model decode at a time; and C follows from the steps' costs at those batches, longer for the part of time in
which prefills run. A load is served if that has a solution within the KV memory.

Held against the simulator in docs/placement.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.placement.solver.contention import BANDWIDTH, Beside, bandwidth_use, slowdown
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import kv_needed, kv_room
from muxserve.placement.solver.workload import Model

SPREAD = 0.9
"""Squared coefficient of variation of output lengths: how much longer than the mean those are that run."""
JOB_TOKENS = 384
"""Prompt tokens of a prefill job under load."""
LONGEST_TURN = 4.0
"""Seconds of a turn; a load that makes turns longer is not served."""
MOST_PREFILL = 0.92
"""Part of time that prefills may take: beyond it prompts wait for each other without end."""
KV_PART = 0.92
"""Part of the KV memory that decoding sequences may fill; the rest is for prompts that come in."""
HIGHEST = 4.0
"""Headroom that is looked for: more makes no difference."""
BISECTIONS = 7
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Load:
    """A model on a unit, and the rate of it that comes there."""

    model: Model
    rate: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a unit."""

    headroom: float
    """The largest multiple of its load that it serves, at most `HIGHEST`; below 1 it is overloaded. 0: it
    does not fit at all."""
    turn: float
    """Seconds between two tokens at its load; at that part of it that is served, if it is overloaded."""
    prefill: float
    """Part of time in which prefills run."""


NOTHING = Forecast(0.0, LONGEST_TURN, 0.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Costs of one model at one degree and share, at its mean lengths."""

    steps: tuple[float, ...]
    """Seconds of a decode step at `BATCHES`."""
    prefill: float
    """Seconds of a prompt in a job of `JOB_TOKENS`."""
    prefill_bandwidth: float
    decode_bandwidth: float
    """Parts of the memory bandwidth that jobs use, of decode ones at a batch of 32."""

    def step(self, batch: float) -> float:
        """Seconds of a decode step."""
        if batch <= 1:
            return self.steps[0]
        i = min(bisect_right(BATCHES, batch), len(BATCHES) - 1) - 1
        low, high = self.steps[i], self.steps[i + 1]
        return low + (high - low) * (batch - BATCHES[i]) / (BATCHES[i + 1] - BATCHES[i])


class Estimator:
    """Forecasts of units, each made once."""

    def __init__(self, costs: CostModel, bandwidth: float = BANDWIDTH) -> None:
        """`bandwidth`: bytes per second of one device."""
        self._costs = costs
        self._bandwidth = bandwidth
        self._curves: dict[tuple[str, float, float, int, float], Curve] = {}

    def forecast(
        self,
        loads: Sequence[Load],
        degree: int,
        usable: int,
        prefill_share: float = 0.5,
        decode_share: float = 0.5,
    ) -> Forecast:
        """`usable`: bytes for weights and KV on each of `degree` GPUs."""
        models = [load.model for load in loads]
        room = kv_room(usable, degree, [m.shape.weight_bytes for m in models])
        if room < kv_needed([m.shape.kv_bytes for m in models]):
            return NOTHING
        return self.forecast_within(loads, degree, room, prefill_share, decode_share)

    def forecast_within(
        self,
        loads: Sequence[Load],
        degree: int,
        kv_bytes: int,
        prefill_share: float = 0.5,
        decode_share: float = 0.5,
    ) -> Forecast:
        """Where weights have memory of their own: `kv_bytes` are for KV, on all devices together."""
        return _Unit(self, loads, degree, kv_bytes, prefill_share, decode_share).forecast()

    def curve(self, model: Model, degree: int, share: float) -> Curve:
        """Costs at its mean lengths."""
        key = (model.model, model.prompt_tokens, model.output_tokens, degree, share)
        if key not in self._curves:
            self._curves[key] = self._look_up(model, degree, share)
        return self._curves[key]

    def _look_up(self, model: Model, degree: int, share: float) -> Curve:
        context = running_tokens(model)
        steps = [self._costs.decode(model.model, degree, share, batch, context) for batch in BATCHES]
        prompts = max(1.0, JOB_TOKENS / model.prompt_tokens)
        job = self._costs.prefill(model.model, degree, share, prompts, model.prompt_tokens)
        decode = bandwidth_use(model.shape, degree, 32 * context, steps[BATCHES.index(32)], self._bandwidth)
        prefill = bandwidth_use(model.shape, degree, prompts * model.prompt_tokens, job, self._bandwidth)
        return Curve(tuple(steps), job / prompts, prefill, decode)


def running_tokens(model: Model) -> float:
    """Tokens known of a sequence that decodes, on average: long outputs are met more often."""
    return model.prompt_tokens + model.output_tokens * (1 + SPREAD) / 2


@dataclass(frozen=True, slots=True)
class _Member:
    rate: float
    output: float
    kv: float
    """Bytes of KV of a sequence that decodes."""
    alone: Curve
    decoding: Curve
    """With its share, beside a prefill."""
    prefilling: Curve
    """With its share, beside decode jobs."""


class _Unit:
    def __init__(
        self,
        estimator: Estimator,
        loads: Sequence[Load],
        degree: int,
        room: int,
        prefill_share: float,
        decode_share: float,
    ) -> None:
        self._room = room * KV_PART
        self._members = [
            _Member(
                load.rate,
                load.model.output_tokens,
                load.model.shape.kv_bytes * (running_tokens(load.model) + 16),
                estimator.curve(load.model, degree, 1.0),
                estimator.curve(load.model, degree, decode_share),
                estimator.curve(load.model, degree, prefill_share),
            )
            for load in loads
        ]
        total = sum(m.rate for m in self._members) or 1.0
        self._slower = slowdown(
            Beside(
                prefill_share, sum(m.rate * m.prefilling.prefill_bandwidth for m in self._members) / total
            ),
            Beside(decode_share, sum(m.rate * m.decoding.decode_bandwidth for m in self._members) / total),
        )

    def forecast(self) -> Forecast:
        if not any(m.rate for m in self._members):
            return Forecast(HIGHEST, sum(m.alone.steps[0] for m in self._members), 0.0)
        now = self._solve(1.0)
        if now is not None and (high := self._solve(HIGHEST)) is not None:
            return Forecast(HIGHEST, *now)
        low, top, solved = (1.0, HIGHEST, now) if now is not None else (0.0, 1.0, None)
        for _ in range(BISECTIONS):
            middle = (low + top) / 2
            if (high := self._solve(middle)) is None:
                top = middle
            else:
                low, solved = middle, high if now is None else now
        return Forecast(low, *(solved or (LONGEST_TURN, 1.0)))

    def _solve(self, scale: float) -> tuple[float, float] | None:
        """Turn and part of time with prefills at `scale` times the load; None: there is no steady state."""
        turn = 0.0
        for _ in range(60):
            longer, prefill = self._turn(scale, turn)
            if longer > LONGEST_TURN or prefill > MOST_PREFILL:
                return None
            if longer - turn < 0.01 * turn:
                break
            turn = longer
        kv = sum(scale * m.rate * m.output * turn * m.kv for m in self._members)
        return (turn, prefill) if kv <= self._room else None

    def _turn(self, scale: float, turn: float) -> tuple[float, float]:
        """The turn that follows from the batches of a turn, and the part of time with prefills."""
        batches = [scale * m.rate * m.output * turn for m in self._members]
        busy = min(1.0, sum(batches)) if turn else 1.0
        alone = sum(scale * m.rate * m.alone.prefill for m in self._members)
        beside = sum(scale * m.rate * m.prefilling.prefill for m in self._members) * self._slower
        prefill = min(1.0, alone * (1 - busy) + beside * busy)
        longer = 0.0
        for m, batch in zip(self._members, batches, strict=True):
            # A model of which nothing decodes most of the time takes no turn most of the time.
            part = 1.0 if batch >= 1 or turn == 0.0 else max(batch, 0.05)
            quick, slow = m.alone.step(batch), m.decoding.step(batch) * self._slower
            longer += part / ((1 - prefill) / quick + prefill / slow)
        return max(longer, turn), prefill


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Where requests begin to miss an SLO of eight times their latency alone: half of them do at `enough`
    headroom, and half at `slow` times their latency alone."""

    enough: float
    enough_width: float
    slow: float
    slow_width: float
    """Of the logistic curves there."""

    def in_time(self, headroom: float, ratio: float) -> float:
        """Part of requests on a unit with that headroom, of a model that takes `ratio` times as long there as
        alone."""
        room = _logistic((headroom - self.enough) / self.enough_width)
        return room * _logistic((self.slow - ratio) / self.slow_width)


CERTAIN = Tolerance(1.1, 0.04, 5.0, 0.5)
"""Rates, lengths and costs are given: as the simulator has it."""


def value(headroom: float, ratio: float, tolerance: Tolerance = CERTAIN) -> float:
    """What a request per second is worth on a unit with that headroom, 0 to 1, if it takes `ratio` times as
    long there as alone.

    Mostly that it is served; then that it is served in time, for which a unit needs headroom, as load comes
    in bursts, and turns that are not too long; then, a little, that there is more of both than that.
    """
    if headroom <= 0:
        return 0.0
    more = 0.03 * (1 - math.exp(-headroom)) + 0.02 * math.exp(-ratio / 4)
    return 0.65 * min(1.0, headroom) + 0.3 * tolerance.in_time(headroom, ratio) + more


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))
