"""Round-robin, the baseline: models take turns, for prompts and leases; no quotas, the newest gives way."""

from __future__ import annotations

from collections.abc import Sequence

from muxserve.scheduler.policy.interface import (
    Decision,
    Event,
    ModelSnapshot,
    PolicyOptions,
    Snapshot,
    Waiting,
)
from muxserve.scheduler.policy.pace import PrefillPace
from muxserve.scheduler.policy.plan import Plan, rotated

PATIENCE = 32
"""Decisions in which a model whose next prompt does not fit is passed over, before nobody else may begin."""


class RoundRobin:
    """Remembers whose turn it is."""

    name = "round_robin"

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options.plain()
        self._pace = PrefillPace(self._options)
        self._last_prefill = ""
        self._last_decode = ""
        self._passed: dict[str, int] = {}
        """How often each model was passed over in a row."""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        plan = Plan(snapshot, self._options, quotas={})
        if plan.takes_prompts:
            self._prefill(plan)
        self._decode(plan)
        plan.end_leases(lambda model, running: True)
        return plan.decisions

    def observe(self, event: Event) -> None:
        """See `Policy`."""
        self._pace.observe(event)

    def _prefill(self, plan: Plan) -> None:
        closed = False

        def fits(model: ModelSnapshot, waiting: Waiting, need: int) -> bool:
            return not closed and need + plan.headroom() <= plan.available

        for name in rotated(plan.models, self._last_prefill):
            model = plan.models[name]
            queue = plan.queue(model)
            if chunks := plan.chunks(model, queue, self._pace.budget(name), fits):
                plan.prefill(model, chunks)
                self._last_prefill = name
                self._passed[name] = 0
                return
            if queue and plan.slots[name]:
                self._passed[name] = self._passed.get(name, 0) + 1
                closed = closed or self._passed[name] > PATIENCE

    def _decode(self, plan: Plan) -> None:
        def start(able: list[str]) -> None:
            for name in rotated(able, self._last_decode):
                if plan.decode(plan.models[name], plan.idle(plan.models[name])):
                    self._last_decode = name
                    return

        plan.start_leases(start)
