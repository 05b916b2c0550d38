"""Temporal multiplexing, the baseline: one model at a time has the device.

As AlpaServe shares a device: the model with the oldest request is served, one job at a time with all of the
device, prompts before leases; while others wait it gives the device up after a quantum, again to the one with
the oldest request. Memory is one pool: no quotas, the newest gives way. While the model whose turn it is has
no room for its prompt, others go on but begin nothing.
"""

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
from muxserve.scheduler.policy.plan import Plan
from muxserve.scheduler.policy.serial import has_work, oldest, prompt_waits, take_turn


class Temporal:
    """Remembers who has the device, and since when."""

    name = "temporal"

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options.plain()
        self._pace = PrefillPace(self._options)
        self._active = ""
        self._since = float("-inf")

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        plan = Plan(snapshot, self._options, quotas={})

        stuck = False

        def fits(model: ModelSnapshot, waiting: Waiting, need: int) -> bool:
            return not stuck and need + plan.headroom(model) <= plan.available

        order = self._order(plan, now)
        if not snapshot.jobs:
            for model in order:
                budget = self._pace.budget(model.model)
                if take_turn(plan, model, budget, self._options.lease_steps, fits):
                    self._turn_of(model.model, now)
                    break
                stuck = stuck or bool(model.waiting and plan.slots[model.model])
        elif order and order[0].model == self._active and not plan.prefilling:
            model = order[0]
            if prompt_waits(plan, model, fits):
                plan.end_all_leases()
            elif any(r.renew for r in plan.idle(model)):
                plan.decode(model, plan.idle(model), self._options.lease_steps, share=1.0)
        return plan.decisions

    def observe(self, event: Event) -> None:
        """See `Policy`."""
        self._pace.observe(event)

    def _order(self, plan: Plan, now: float) -> list[ModelSnapshot]:
        """Who gets the device: who has it, until its quantum is over, then those with the oldest requests."""
        busy = sorted((m for m in plan.models.values() if has_work(m)), key=oldest)
        stays = now - self._since < self._options.quantum
        return sorted(busy, key=lambda m: (m.model == self._active) != stays)

    def _turn_of(self, model: str, now: float) -> None:
        if model != self._active or now - self._since >= self._options.quantum:
            self._active, self._since = model, now
