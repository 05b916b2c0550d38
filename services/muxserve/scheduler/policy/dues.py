"""`Dues`: when requests should be finished, and what that takes. `Rush`: whether most of them can be."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.scheduler.policy.admission import Forecast
from muxserve.scheduler.policy.interface import ModelSnapshot, PolicyOptions, Running, Waiting
from muxserve.scheduler.policy.latency import Latency

LEAST_DUE = 0.2
"""Seconds that any request has until it is due."""
PATIENT = 2.0
"""How many times as long as until it is due a request's deadline leaves it, if it is worth serving late."""
WAIT = 0.5
"""Part of the time until a request is due that it may wait: decoding beside others takes the rest."""
KEPT = 8192
"""Sequences remembered."""


class Dues:
    """Of one unit's requests: a model's TTFT target, or `stretch` times what they take alone."""

    def __init__(self, options: PolicyOptions, latency: Latency, forecast: Forecast) -> None:
        self._options = options
        self._latency = latency
        self._forecast = forecast
        self._running: dict[int, float] = {}

    def waiting(self, model: ModelSnapshot, waiting: Waiting) -> float:
        """When its first token should be there at the latest, or all of it where that is what counts."""
        if model.ttft_target and not waiting.emitted:
            return waiting.arrival + model.ttft_target
        alone = self._latency.alone(model.model, waiting.tokens, self.output(model, waiting))
        return min(waiting.arrival + max(LEAST_DUE, self._options.stretch * alone), waiting.deadline)

    def running(self, model: str, running: Running) -> float:
        """When all of it should be there."""
        due = self._running.get(running.sequence)
        if due is None:
            if len(self._running) > KEPT:
                self._running.clear()
            output = self._forecast.output(model, running.limit - running.prompt)
            alone = self._latency.alone(model, running.prompt, output)
            due = running.arrival + max(LEAST_DUE, self._options.stretch * alone)
            self._running[running.sequence] = due
        return due

    def output(self, model: ModelSnapshot, waiting: Waiting) -> int:
        """Tokens that it will generate."""
        return self._forecast.output(model.model, waiting.limit - waiting.tokens)

    def left(self, model: ModelSnapshot, waiting: Waiting) -> float:
        """Seconds until what is due is there, with the device for itself."""
        left = self._latency.prefill(model.model, waiting.tokens - waiting.computed)
        if not model.ttft_target or waiting.emitted:
            left += self.output(model, waiting) * self._latency.lone_step(model.model)
        return left


@dataclass(slots=True)
class Rush:
    """What waits and is of use also when it is late."""

    count: int = 0
    left: float = 0.0
    """Seconds that all of it would take one after the other."""
    allowed: float = 0.0
    """Seconds from arrival until it is due, each for itself."""

    def add(self, waiting: Waiting, due: float, left: float) -> None:
        """Count a request, if it is of use then."""
        if waiting.deadline - waiting.arrival > PATIENT * (due - waiting.arrival):
            self.count += 1
            self.left += left
            self.allowed += due - waiting.arrival

    def lost(self, together: float) -> bool:
        """Whether most of it will be late, whatever is done: all of it takes longer than each may wait.
        together: how many times as fast requests are served beside each other."""
        return self.count > 0 and self.left / max(1.0, together) > WAIT * self.allowed / self.count
