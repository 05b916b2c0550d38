"""Goodput: the highest rate at which (almost) all requests meet their SLO, found by trying rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

TARGET = 0.99
"""Part of the requests that must meet their SLO."""


def allowed_misses(requests: int, target: float = TARGET) -> int:
    """How many of `requests` may miss their SLO. None of fewer than 1 / (1 - target)."""
    return math.floor(requests * (1 - target) + 1e-9)


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried."""

    rate: float
    """Requests a second, as asked."""
    requests: int
    """Planned. A probe that fails ends before all of them were sent."""
    missed: int
    passed: bool


@dataclass(frozen=True, slots=True)
class Goodput:
    """What a search found."""

    rate: float
    """Highest rate that passed; 0: none did."""
    below: float | None
    """Lowest rate above it that failed: the truth is in between. None: none failed."""
    probes: tuple[Probe, ...]


class Search:
    """Tries rates: up or down by `step` until one passed and one failed, then their geometric middle, until
    they are `resolution` apart or `probes` were made. Pure: who runs the probes tells it what came out."""

    def __init__(
        self,
        start: float,
        *,
        step: float = 1.6,
        resolution: float = 1.08,
        probes: int = 8,
        least: float = 0.0,
    ) -> None:
        """least: a rate below which nothing is tried any more."""
        if not (start > 0 and step > 1 and resolution > 1):
            raise ValueError(
                f"start {start}, step {step} and resolution {resolution} must be above 0, 1 and 1"
            )
        self._start, self._step, self._resolution = start, step, resolution
        self._most, self._least = probes, least
        self._probes: list[Probe] = []

    @property
    def result(self) -> Goodput:
        """So far. A pass above a failure counts for nothing: the service was lucky there."""
        failed = min((probe.rate for probe in self._probes if not probe.passed), default=None)
        passed = [probe.rate for probe in self._probes if probe.passed]
        below = [rate for rate in passed if failed is None or rate < failed]
        return Goodput(max(below, default=0.0), failed, tuple(self._probes))

    def next_rate(self) -> float | None:
        """What to try next; None: enough is known."""
        if not self._probes:
            return self._start
        found = self.result
        if len(self._probes) >= self._most:
            return None
        if found.below is None:
            return found.rate * self._step
        if found.rate == 0:
            lower = found.below / self._step
            return lower if lower >= self._least else None
        if found.below / found.rate <= self._resolution:
            return None
        return math.sqrt(found.below * found.rate)

    def record(self, probe: Probe) -> None:
        """What came of a rate."""
        self._probes.append(probe)
