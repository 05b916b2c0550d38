"""Figures of a run, per model and in total."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from muxserve.bench.latency import Slo
from muxserve.bench.outcomes import Outcome, Status

SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""SLO scales at which attainment is reported."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of latencies, in seconds. NaN of nothing."""

    count: int
    mean: float
    p50: float
    p99: float

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread:
        """Of those that are not None."""
        known = [value for value in values if value is not None]
        if not known:
            return Spread(0, math.nan, math.nan, math.nan)
        p50, p99 = np.percentile(known, (50, 99))
        return Spread(len(known), float(np.mean(known)), float(p50), float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """Of some of a run's requests: those that arrived within a window of time, and what ended within it."""

    requests: int
    """That arrived."""
    ok: int
    refused: int
    late: int
    failed: int
    unfinished: int
    request_rate: float
    """Completed per second of the window, whenever they arrived."""
    token_rate: float
    """Output tokens of those, per second."""
    ttft: Spread
    tpot: Spread
    latency: Spread
    """Of complete answers, as all three are."""
    refusal: Spread
    """From arrival to the refusal."""
    attainment: dict[float, float]
    """By SLO scale: the part of all requests, refused ones included, that met it. Empty without an SLO."""
    admitted_attainment: dict[float, float]
    """The same, of those that were not refused."""


def meets(outcome: Outcome, slo: Slo, scale: float) -> bool:
    """Whether it was answered in full within `scale` times its unloaded latency."""
    if outcome.status is not Status.OK:
        return False
    alone = slo.unloaded[outcome.model].latency(outcome.prompt_tokens, outcome.asked_tokens)
    return outcome.latency <= scale * alone


def summarize(everything: Iterable[Outcome], begin: float, end: float, slo: Slo | None) -> Summary:
    """Of the window [begin, end), in seconds of the run. Attainment is told up to the scale of `slo`, which
    may have been the requests' deadline: beyond it nothing is known."""
    everything = list(everything)
    ended = [one for one in everything if one.status is Status.OK and begin <= one.end < end]
    outcomes = [one for one in everything if begin <= one.at < end]
    seconds = end - begin
    counts = {status: sum(one.status is status for one in outcomes) for status in Status}
    done = [one for one in outcomes if one.status is Status.OK]
    refused = [one for one in outcomes if one.status is Status.REFUSED]
    attained: dict[float, float] = {}
    admitted: dict[float, float] = {}
    if slo is not None:
        for scale in sorted({*(scale for scale in SCALES if scale < slo.scale), slo.scale}):
            met = sum(meets(one, slo, scale) for one in outcomes)
            attained[scale] = met / len(outcomes) if outcomes else math.nan
            taken = len(outcomes) - len(refused)
            admitted[scale] = met / taken if taken else math.nan
    return Summary(
        requests=len(outcomes),
        ok=len(done),
        refused=len(refused),
        late=counts[Status.LATE],
        failed=counts[Status.FAILED],
        unfinished=counts[Status.UNFINISHED],
        request_rate=len(ended) / seconds,
        token_rate=sum(one.tokens for one in ended) / seconds,
        ttft=Spread.of(one.ttft for one in done),
        tpot=Spread.of(one.tpot for one in done),
        latency=Spread.of(one.latency for one in done),
        refusal=Spread.of(one.end - one.sent for one in refused),
        attainment=attained,
        admitted_attainment=admitted,
    )


def by(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    """Grouped, by name."""
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(key(one), []).append(one)
    return dict(sorted(found.items()))


def jain(values: Sequence[float]) -> float:
    """Jain's index, (Σx)² / (n Σx²): 1 where all have the same, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return 1.0 if squares == 0 else sum(values) ** 2 / (len(values) * squares)


def fairness(groups: Iterable[Sequence[Outcome]]) -> float:
    """Jain's index of the groups' served parts: output tokens that arrived, over those asked for."""
    parts = [
        sum(one.tokens for one in group) / max(1, sum(one.asked_tokens for one in group)) for group in groups
    ]
    return jain(parts)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Where the part lies, with 95% confidence, of which `hits` of `count` were seen (Wilson)."""
    if count == 0:
        return 0.0, 1.0
    part = hits / count
    middle = part + z * z / (2 * count)
    half = z * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)
