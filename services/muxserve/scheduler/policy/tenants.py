"""`Tenants`: who had more than others. Virtual token counters, after Sheng et al., "Fairness in Serving Large
Language Models" (OSDI 2024).

A tenant's counter grows with the tokens it is served. Who comes back after a pause is lifted to the least of
those that wait, so that nobody saves up a right to crowd others out. Here that is less by `CREDIT`: the first
request of a tenant that returns goes before those of one that was there all the time.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxserve.scheduler.policy.interface import JobEnded, ModelSnapshot

INPUT, OUTPUT = 1.0, 2.0
"""What a token of a prompt, and one that is generated, count for."""
CREDIT = 1000.0
"""Counters count as equal within this: a few requests' worth."""
MOST = 10_000
"""Counters kept."""


class Tenants:
    """The counters of one unit."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: set[str] = set()
        """Who had something waiting at the last look."""
        self._last = 0.0
        """The least counter at the last look at which anybody waited."""

    def observe(self, event: JobEnded) -> None:
        """Charge what was served."""
        weight = INPUT if event.kind == "prefill" else OUTPUT
        for tenant, tokens in event.tenants.items():
            self._counters[tenant] = self._counters.get(tenant, self._last) + weight * tokens

    def look(self, models: Iterable[ModelSnapshot]) -> None:
        """See who waits; lift those that did not before."""
        waiting = {w.tenant for m in models for w in m.waiting}
        stayed = [self._counters[tenant] for tenant in waiting & self._waiting if tenant in self._counters]
        least = min(stayed) if stayed else self._last
        for tenant in waiting - self._waiting:
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), least - CREDIT)
        if waiting:
            self._last = min(self._counters.get(tenant, least) for tenant in waiting)
        self._waiting = waiting
        if len(self._counters) > MOST:
            kept = sorted(self._counters, key=self._counters.__getitem__)[MOST // 2 :]
            self._counters = {tenant: self._counters[tenant] for tenant in {*kept, *waiting}}

    def rank(self, tenant: str) -> int:
        """0 for those that had least; more for who had more."""
        return int((self._counters.get(tenant, self._last) - self._last) / CREDIT)
