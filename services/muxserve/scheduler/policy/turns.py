"""`Turns`: which model decodes next, so that each gets the steps that its sequences need to be in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.scheduler.policy.dues import Dues
from muxserve.scheduler.policy.interface import JobEnded, ModelSnapshot, PolicyOptions
from muxserve.scheduler.policy.latency import Latency
from muxserve.scheduler.policy.plan import Plan

HOPELESS = 0.5
"""Part of the device that a sequence can count on: what needs more to be in time will be late."""
OWED = 1.0
"""Seconds that a model is behind another at most, in steps that it should have had: one that lacks more than
its lane has is first in it anyway, but whoever begins where it is would go before all others until these have
been caught up with."""
LEAST_PACE = 0.5
"""Of a model whose sequences have time, in parts of what `stretch` allows."""
PACE_SECONDS = 0.1
"""For which that is taken to hold."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What so many sequences of a model need."""

    sequences: int
    steps: float
    """Per second, for all of them to be in time that can be."""
    last_start: float
    """When one of them would be late if it did not go on."""
    until: float
    """When this is to be found out anew."""


class Turns:
    """How far the steps suffice that each model has had."""

    def __init__(self, options: PolicyOptions, latency: Latency, dues: Dues) -> None:
        self._options = options
        self._latency = latency
        self._dues = dues
        self._served: dict[str, float] = {}
        """Seconds for which the steps that each model has had suffice, since a time that is the same for
        all."""
        self._begun = 0.0
        """Where a model begins that did not decode: where the one is that has had least."""
        self._paces: dict[str, Pace] = {}

    def observe(self, event: JobEnded) -> None:
        """A decode job ended."""
        if event.model in self._served:
            self._served[event.model] += event.steps / self._paces[event.model].steps

    def order(self, plan: Plan, able: Sequence[str], steps: int, now: float) -> list[str]:
        """Models in proportion to the steps that they need: the one first whose steps, those of leases that
        run included, suffice for the shortest time. Before these, one with a sequence that would be late if
        it waited for another turn. steps: of a lease."""
        for name in [n for n in self._served if n not in plan.models or not plan.models[n].running]:
            del self._served[name]
        least, most = min(self._served.values(), default=0.0), max(self._served.values(), default=0.0)
        self._begun = max(self._begun, least, most - OWED)
        for name, served in self._served.items():
            self._served[name] = max(served, self._begun)
        reached = {}
        for name in able:
            served = self._served.setdefault(name, self._begun)
            reached[name] = served + plan.leases(name) * steps / self._pace(plan.models[name], now)
        soon = now + self._options.turn_seconds
        last = {name: at if (at := self._paces[name].last_start) < soon else math.inf for name in able}
        return sorted(able, key=lambda name: (last[name], reached[name]))

    def _pace(self, model: ModelSnapshot, now: float) -> float:
        """Steps per second that the model needs for all of its sequences to be in time that can be."""
        name, count = model.model, len(model.running)
        known = self._paces.get(name)
        if known is not None and known.sequences == count and now < known.until:
            return known.steps
        least = self._latency.lone_step(name)
        usual = 1 / (self._options.stretch * least)
        rates = [model.tpot_target and 1 / model.tpot_target, LEAST_PACE * usual]
        last_start = math.inf
        for r in model.running:
            left, tokens = self._dues.running(name, r) - now, r.limit - r.length
            spare = left - tokens * least / HOPELESS
            if spare > 0:  # others are late whatever is done
                rates.append(tokens / left)
                last_start = min(last_start, now + spare)
        steps = min(max(rates), 1 / least)
        self._paces[name] = Pace(count, steps, last_start, now + PACE_SECONDS)
        return steps
