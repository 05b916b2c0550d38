"""`Tally`: what a unit has done since its scheduler began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from muxserve.scheduler.requests import Request
from muxserve.v1 import scheduler_pb2


class Tally:
    """Counts, by kind of job and by model."""

    def __init__(self) -> None:
        self.jobs: Counter[str] = Counter()
        """Started, by kind."""
        self.preemptions: Counter[str] = Counter()
        """Sequences that lost their blocks and were to be recomputed."""
        self.refusals: Counter[str] = Counter()
        """Requests that were turned away."""
        self.generated: Counter[str] = Counter()
        """Tokens sampled."""
        self.prefilled: Counter[str] = Counter()
        """Prompt tokens computed, recomputation included."""

    def status(
        self, unit: str, policy: str, connected: bool, quotas: Mapping[str, int], requests: Iterable[Request]
    ) -> scheduler_pb2.UnitStatus:
        """The unit's status; its models are those of `quotas`."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for request in requests:
            (waiting if request.sequence is None else running)[request.model] += 1
        models = [
            scheduler_pb2.UnitModelStatus(
                model=name,
                running=running[name],
                waiting=waiting[name],
                quota_blocks=quota,
                preemptions=self.preemptions[name],
                generated_tokens=self.generated[name],
                prefill_tokens=self.prefilled[name],
                refusals=self.refusals[name],
            )
            for name, quota in quotas.items()
        ]
        return scheduler_pb2.UnitStatus(
            unit=unit,
            connected=connected,
            policy=policy,
            models=models,
            prefill_jobs=self.jobs["prefill"],
            decode_jobs=self.jobs["decode"],
        )
