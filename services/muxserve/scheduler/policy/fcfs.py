"""FCFS, the baseline: first come first served over all models, no quotas, the newest gives way."""

from __future__ import annotations

from collections.abc import Sequence

from muxserve.scheduler.policy.interface import Decision, Event, PolicyOptions, Snapshot
from muxserve.scheduler.policy.pace import PrefillPace
from muxserve.scheduler.policy.plan import Plan


class Fcfs:
    """Remembers nothing but how fast prefill jobs run."""

    name = "fcfs"

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options.plain()
        self._pace = PrefillPace(self._options)

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

    def _decode(self, plan: Plan) -> None:
        """Models whose oldest sequence came first get leases."""

        def start(able: list[str]) -> None:
            for name in sorted(able, key=lambda n: plan.idle(plan.models[n])[0].arrival):
                if plan.decode(plan.models[name], plan.idle(plan.models[name])):
                    return

        plan.start_leases(start)

    def _prefill(self, plan: Plan) -> None:
        """The model whose head came first gets a job; if that does not fit, nobody gets one."""
        heads = {name: queue[0] for name, m in plan.models.items() if (queue := plan.queue(m))}
        for name in sorted(heads, key=lambda n: (not heads[n].open, heads[n].arrival, heads[n].sequence)):
            model = plan.models[name]
            chunks = plan.chunks(
                model,
                plan.queue(model),
                self._pace.budget(name),
                lambda m, w, need: need + plan.headroom() <= plan.available,
            )
            if chunks:
                plan.prefill(model, chunks)
            if chunks or plan.slots[name]:
                return
