"""One rate of a goodput search, tried on a real target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muxserve.bench.generator import Generator, Limits
from muxserve.bench.latency import Slo
from muxserve.bench.outcomes import Outcome
from muxserve.bench.search import TARGET, Probe, allowed_misses
from muxserve.bench.statistics import meets
from muxserve.bench.targets import Target
from muxserve.bench.workload import Request


class Watch:
    """Counts requests that missed their SLO, and says when there are too many."""

    def __init__(self, planned: int, slo: Slo, target: float = TARGET) -> None:
        self._allowed = allowed_misses(planned, target)
        self._slo = slo
        self.missed = 0

    @property
    def failed(self) -> bool:
        """Whether more missed than may."""
        return self.missed > self._allowed

    def __call__(self, outcome: Outcome) -> bool:
        self.missed += not meets(outcome, self._slo, self._slo.scale)
        return self.failed


def prepare(requests: Sequence[Request], targets: Mapping[str, Target], slo: Slo) -> tuple[Generator, Watch]:
    """A run whose requests have their SLO as deadline, and that ends as soon as it has failed."""
    watch = Watch(len(requests), slo)
    return Generator(requests, targets, slo.deadline, Limits(drain=3600), watch), watch


def verdict(rate: float, requests: Sequence[Request], watch: Watch) -> Probe:
    """What the run says about `rate`. One without a request says nothing, and fails."""
    return Probe(rate, len(requests), watch.missed, bool(requests) and not watch.failed)
