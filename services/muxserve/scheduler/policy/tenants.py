"""`Tenants`: who had more than others. Virtual token counters, after Sheng et al., "Fairness in Serving Large
Language Models" (OSDI 2024).

A tenant's counter grows with the tokens it is served. Who comes back after a pause is lifted to the least of
those that wait, so that nobody saves up a right to crowd others out. Here that is less by `CREDIT`: the first
request of a tenant that returns goes before those of one that was there all the time.

Counters say whose turn it is; they do not say who makes it crowded. That is told from what each was served of
late, and from who is there: see `Tenants.crowds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from muxserve.scheduler.policy.interface import JobEnded, ModelSnapshot

INPUT, OUTPUT = 1.0, 2.0
"""What a token of a prompt, and one that is generated, count for."""
CREDIT = 1000.0
"""Counters count as equal within this: a few requests' worth."""
MOST = 10_000
"""Counters kept."""
HALF_LIFE = 20.0
"""Seconds in which half of what was served is forgotten, where it is asked who makes it crowded."""
CROWD = 1.5
"""How many times as much as tenants had on average somebody has who makes it crowded."""
MANY = 8
"""Requests that somebody has, waiting or running, and ..."""
TIMES = 2.0
"""... how many times as many as anybody else, who makes it crowded right now: before it shows in what was
served."""
REBASE = 40
"""Half-lives after which what was served is counted from a new origin: numbers stay small."""


class Tenants:
    """The counters of one unit."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: set[str] = set()
        """Who had something waiting at the last look."""
        self._last = 0.0
        """The least counter at the last look at which anybody waited."""
        self._recent: dict[str, float] = {}
        """What was served of late: what is new counts for more, instead of what is old for less."""
        self._origin = self._now = 0.0
        self._crowding: frozenset[str] = frozenset()

    def observe(self, event: JobEnded) -> None:
        """Charge what was served."""
        self._charge(event.tenants, INPUT if event.kind == "prefill" else OUTPUT)
        self._charge(event.prompts, INPUT)

    def _charge(self, served: Mapping[str, float], weight: float) -> None:
        now = 2 ** ((self._now - self._origin) / HALF_LIFE)
        for tenant, tokens in served.items():
            self._counters[tenant] = self._counters.get(tenant, self._last) + weight * tokens
            self._recent[tenant] = self._recent.get(tenant, 0.0) + now * weight * tokens

    def look(self, models: Sequence[ModelSnapshot], now: float) -> None:
        """See who waits; lift those that did not before."""
        self._pass(now)
        queue = Counter(w.tenant for m in models for w in m.waiting)
        waiting = set(queue)
        self._crowding = self._who_crowds(queue, models)
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

    @property
    def crowded(self) -> bool:
        """Whether somebody has, or waits for, much more than others who are there too."""
        return bool(self._crowding)

    def crowds(self, tenant: str) -> bool:
        """Whether that is this one."""
        return tenant in self._crowding

    def _who_crowds(self, queue: Counter[str], models: Iterable[ModelSnapshot]) -> frozenset[str]:
        """Of the tenants that wait or run. Nobody crowds without company."""
        if len(self._recent) < 2:
            return frozenset()
        there = Counter(r.tenant for m in models for r in m.running)
        there.update(queue)
        if len(there) < 2:
            return frozenset()
        had = {tenant: self._recent.get(tenant, 0.0) for tenant in there}
        much = CROWD * sum(had.values()) / len(had)
        crowding = {tenant for tenant, tokens in had.items() if tokens > much}
        (first, most), (_, next_most) = there.most_common(2)
        if most >= MANY and most > TIMES * next_most:
            crowding.add(first)
        return frozenset(crowding)

    def _pass(self, now: float) -> None:
        self._now = now
        if now - self._origin > REBASE * HALF_LIFE or len(self._recent) > MOST:
            less = 2 ** ((self._origin - now) / HALF_LIFE)
            self._origin = now
            self._recent = {t: had * less for t, had in self._recent.items() if had * less > 1.0}

    def rank(self, tenant: str) -> int:
        """0 for those that had least; more for who had more."""
        return int((self._counters.get(tenant, self._last) - self._last) / CREDIT)
