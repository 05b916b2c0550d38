"""`Company`: whether prompts wait for a lease of their model, or for others, to share a pass with.

A prefill job reads all weights, however few tokens it computes: where prompts are short, two in one job take
little longer than one, and a decode step that computes one as well little longer than a step. So where a
model decodes, and decode jobs can have prompts, a short prompt waits for the next lease. Else it waits where
another one of its model is likely to come before those that decode would have got a token or two, and where
the job would mostly be what any job takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from muxserve.scheduler.policy.interface import ModelSnapshot, Waiting
from muxserve.scheduler.policy.latency import Latency

PATIENCE = 1.5
"""How many times as long as from one token to the next of those that decode a prompt waits at most."""
LEASE_PATIENCE = 3.0
"""The same where its model decodes: so many steps may pass until a lease can have it, as one that has not
done a step is not ended, and models take turns."""
ENOUGH = 3.0
"""How many times as long as one for a single token a job takes that is not made to wait."""
NEWEST = 0.1
"""Weight of the newest time between arrivals."""


class Company:
    """How often prompts come, by model."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._last: dict[str, float] = {}
        """When the latest one came."""
        self._between: dict[str, float] = {}
        """Seconds between two, on average."""

    def look(self, models: Collection[ModelSnapshot]) -> None:
        """See what has come."""
        for m in models:
            if not m.waiting:
                continue
            last = self._last.get(m.model)
            if last is None:
                self._last[m.model] = max(w.arrival for w in m.waiting)
                continue
            new = []
            for w in reversed(m.waiting):  # in the order of arrival, but for those that came back
                if w.arrival <= last:
                    break
                new.append(w.arrival)
            for arrival in sorted(new):
                usual = self._between.setdefault(m.model, arrival - last)
                self._between[m.model] = usual + NEWEST * (arrival - last - usual)
                last = arrival
            self._last[m.model] = last

    def until(self, model: ModelSnapshot, queue: Sequence[Waiting], pace: float) -> float:
        """Until when these prompts wait for others; a time that has passed: no longer. pace: seconds between
        two tokens of what decodes."""
        patience = PATIENCE * pace
        between = self._between.get(model.model)
        if between is None or patience < between or model.ttft_target:
            return 0.0
        if any(w.open or w.emitted for w in queue):
            return 0.0
        tokens = sum(w.tokens for w in queue)
        least = self._latency.prefill(model.model, 1)
        if self._latency.prefill(model.model, tokens) >= ENOUGH * least:
            return 0.0
        return min(w.arrival for w in queue) + patience

    def lease_until(self, model: ModelSnapshot, waiting: Waiting, pace: float, room: int) -> float:
        """The same of a prompt that the next lease of its model takes along, if what is left of it is no more
        than `room` tokens."""
        if model.ttft_target or waiting.emitted or waiting.tokens - waiting.computed > room:
            return 0.0
        return waiting.arrival + LEASE_PATIENCE * pace
