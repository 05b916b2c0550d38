"""`Traffic`: how often each model is asked for, and how long its requests are, from counters that only grow.

Rates are weighted exponentially twice: a slow one that is planned with, and a fast one that notices change.
Where the fast one leaves the noise of the slow one there is a burst; one that lasts is no burst but the new
rate, and the slow one begins again from it. A large change of one model makes what is known of the others
count less, as popularity often changes for all at once. Pure: moments are passed in, in seconds of any one
clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

SLOW, FAST, LAST = 90.0, 6.0, 2.0
"""Time constants in seconds: of the two rates, and of what came last."""
ALARM, CALM = 3.5, 2.0
"""Standard deviations from the slow rate at which a burst begins, and below which it is over."""
PATIENCE = 8.0
"""Seconds after which a burst is taken for the new rate, unless it is just over."""
LASTING = 0.4
"""Part of its height that a burst must still have to be no burst."""
SHIFT = 0.1
"""Part of all requests by which a model's rate has to change for other models' rates to be doubted."""
DOUBTED = 6.0
"""Seconds of traffic that such a rate then counts as."""
MOMENT = 2.0
"""Seconds of the rate before that count with a new one, or as many as a request takes to come."""
PRIOR_SECONDS = 10.0
"""How much a stated rate counts: as much as so many seconds of traffic."""
PRIOR_TOKENS = 128.0
"""Length of prompts and outputs while nothing is known of them."""
REMEMBERED = 300.0
"""Time constant of mean lengths, in seconds."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Counters of requests that have finished, as one scheduler gives them for a model."""

    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known of a model's traffic."""

    rate: float
    """Requests per second to plan with; a burst that has not lasted does not count."""
    fast: float
    """Requests per second of the last seconds."""
    burst: bool
    """Whether `fast` is not explained by chance."""
    prompt_tokens: float
    output_tokens: float
    """Means of a request."""
    seconds: float
    """For how long it was observed."""


@dataclass(slots=True)
class _Rate:
    """Events and seconds, both weighted exponentially; their quotient is the rate."""

    constant: float
    events: float = 0.0
    seconds: float = 0.0

    def add(self, events: float, seconds: float) -> None:
        kept = math.exp(-seconds / self.constant)
        # Spread over the interval, as it is not known when in it they came.
        weight = (1 - kept) * self.constant
        self.events = self.events * kept + events * weight / seconds
        self.seconds = self.seconds * kept + weight

    @property
    def value(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Series:
    slow: _Rate
    fast: _Rate
    latest: _Rate
    first: float
    last: float
    arrived: int | None = None
    burst: _Rate | None = None
    """Of what came since the burst was noticed; None: there is none."""
    counted: dict[str, Lengths] = field(default_factory=dict)
    """By source."""
    requests: float = 1.0
    prompts: float = PRIOR_TOKENS
    outputs: float = PRIOR_TOKENS
    measured: float = 0.0
    """When lengths were last added to."""


class Traffic:
    """All models' traffic. Models that were never observed have none."""

    def __init__(self, expected: Mapping[str, float] | None = None) -> None:
        """`expected`: rates that were stated, by model: they count until traffic says otherwise."""
        self._expected = dict(expected or {})
        self._models: dict[str, _Series] = {}

    def arrivals(self, model: str, now: float, total: int) -> None:
        """`total` requests have arrived since the counter began. A counter that fell has begun again."""
        series = self._series(model, now)
        elapsed, before = now - series.last, series.arrived
        if before is None or total < before:
            series.arrived, series.last = total, now
            return
        if elapsed <= 0:
            return
        series.arrived, series.last = total, now
        series.slow.add(total - before, elapsed)
        series.fast.add(total - before, elapsed)
        series.latest.add(total - before, elapsed)
        if series.burst is not None:
            series.burst.add(total - before, elapsed)
        if self._lasts(series):
            self._believe(series)

    def lengths(self, model: str, source: str, now: float, counters: Lengths) -> None:
        """What `source` has counted so far. Counters that fell have begun again."""
        series = self._series(model, now)
        before = series.counted.get(source)
        series.counted[source] = counters
        if before is None or counters.finished < before.finished:
            before = Lengths()
        finished = counters.finished - before.finished
        if finished <= 0:
            return
        kept = math.exp(-max(0.0, now - series.measured) / REMEMBERED)
        series.measured = now
        series.requests = series.requests * kept + finished
        series.prompts = series.prompts * kept + max(0, counters.prompt_tokens - before.prompt_tokens)
        series.outputs = series.outputs * kept + max(0, counters.output_tokens - before.output_tokens)

    def believing(self) -> Traffic:
        """A copy that takes every burst for the new rate at once."""
        other = deepcopy(self)
        for series in other._models.values():
            if series.burst is not None:
                other._believe(series)
        return other

    def flow(self, model: str) -> Flow:
        """What is known of `model`."""
        series = self._models.get(model)
        if series is None:
            rate = self._expected.get(model, 0.0)
            return Flow(rate, rate, False, PRIOR_TOKENS, PRIOR_TOKENS, 0.0)
        return Flow(
            rate=series.slow.value,
            fast=series.fast.value,
            burst=series.burst is not None,
            prompt_tokens=max(1.0, series.prompts / series.requests),
            output_tokens=max(1.0, series.outputs / series.requests),
            seconds=series.last - series.first,
        )

    def _series(self, model: str, now: float) -> _Series:
        if model not in self._models:
            rate = self._expected.get(model, 0.0)
            weight = PRIOR_SECONDS if rate else 0.0
            slow = _Rate(SLOW, rate * weight, weight)
            fast = _Rate(FAST, rate * min(weight, FAST), min(weight, FAST))
            self._models[model] = _Series(slow, fast, _Rate(LAST), now, now, measured=now)
        return self._models[model]

    def _believe(self, series: _Series) -> None:
        """Its burst is its rate now, and if that is much of all requests, other rates are doubted."""
        usual = series.slow.value
        _renew(series)
        if abs(series.slow.value - usual) >= SHIFT * sum(other.slow.value for other in self._models.values()):
            for other in self._models.values():
                if other is not series:
                    _doubt(other)

    @staticmethod
    def _lasts(series: _Series) -> bool:
        """Notice a burst and its end; whether it has lasted so long that it is the rate now."""
        distance = abs(deviation(series.fast.value, series.slow.value, 2 * series.fast.seconds))
        if series.burst is None:
            if distance >= ALARM:
                series.burst = _Rate(SLOW)
        elif distance < CALM:
            series.burst = None
        elif series.burst.seconds >= PATIENCE * 0.95:  # weighted: a little less than those that passed
            height = series.burst.value - series.slow.value
            left = (series.latest.value - series.slow.value) * math.copysign(1, height)
            return abs(height) <= left / LASTING
        return False


def _doubt(series: _Series) -> None:
    """Popularity has changed, and perhaps that of this model, too: the last seconds count as much as all that
    was before them, and what is a burst is the new rate."""
    if series.burst is not None:
        _renew(series)
        return
    weight = min(series.slow.seconds, DOUBTED)
    before = series.slow.value * weight
    series.slow = _Rate(SLOW, before + series.fast.events, weight + series.fast.seconds)


def _renew(series: _Series) -> None:
    """A burst is the rate now. A moment of the rate before, of one request at most, counts with it: some
    seconds in which nothing comes do not say that nothing will come."""
    before, burst = series.slow.value, series.burst
    assert burst is not None
    seconds = min(MOMENT, 1 / before) if before else 0.0
    series.slow = _Rate(SLOW, burst.events + before * seconds, burst.seconds + seconds)
    series.burst = None


def deviation(rate: float, usual: float, seconds: float) -> float:
    """How many standard deviations `rate` over so many seconds is from what Poisson arrivals at the `usual`
    rate give: by Anscombe's transform (1948), which holds for few events as well."""
    seen, expected = max(0.0, rate * seconds), max(0.0, usual * seconds)
    return 2 * (math.sqrt(seen + 0.375) - math.sqrt(expected + 0.375))
