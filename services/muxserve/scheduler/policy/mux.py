"""`mux`, the default: ADBS with an eye on what each request was promised. Every addition has its switch.

slack       Every request has a time at which it is due: its model's TTFT target, or `stretch` times what it
            takes alone on the device. Prompts go by that, so that short requests do not wait behind long
            ones; those that are late already let those pass that can still make it, until they get old. No
            more sequences decode at once than keeps everybody's pace.
turns       Models decode equally many steps per turn, so that each sequence gets on at the same pace, and
            few of them if turns are dear.
chunked     Prompts come in chunks short enough that the next urgent one is soon served.
shares      Where models have targets for time per output token, prefill gets what compute these leave.
borrow, priorities, fairness, admission: see `PolicyOptions`.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxserve.scheduler.policy.adbs import Adbs
from muxserve.scheduler.policy.interface import (
    Decision,
    JobEnded,
    ModelSnapshot,
    PolicyOptions,
    Snapshot,
    Waiting,
)
from muxserve.scheduler.policy.latency import Latency
from muxserve.scheduler.policy.pace import PrefillPace
from muxserve.scheduler.policy.plan import Plan
from muxserve.scheduler.policy.tenants import Tenants

FULL = 0.7
"""Part of `stretch` by which sequences that decode together may slow each other down; waiting takes the rest."""
RESERVE = 1.25
"""How far those that had little may go beyond that."""
OLD = 20.0
"""Seconds after which a late request is served before any other."""
LEAST_DUE = 0.2
"""Seconds that any request has until it is due."""

Key = tuple[object, ...]


class Mux(Adbs):
    """ADBS's memory, and what was learned of the device and of tenants."""

    name = "mux"

    def __init__(self, options: PolicyOptions) -> None:
        super().__init__(options)
        self._options = options
        self._pace = PrefillPace(options)
        self._latency = Latency()
        self._tenants = Tenants()
        self._now = 0.0
        self._rest_until = 0.0
        """Until when no prompt is computed, for the sake of what decodes."""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        self._now = now
        if self._options.fairness:
            self._tenants.look(snapshot.models)
        return super().decide(snapshot, now)

    def observe(self, event: JobEnded) -> None:
        """See `Policy`."""
        super().observe(event)
        self._latency.observe(event)
        if self._options.fairness:
            self._tenants.observe(event)

    # Prompts

    def _order(self, plan: Plan) -> list[tuple[ModelSnapshot, list[Waiting]]]:
        if not (self._options.slack or self._options.fairness):
            return super()._order(plan)
        keyed = []
        for model in plan.models.values():
            if queue := plan.queue(model):
                keys = {w.sequence: self._key(model, w) for w in queue}
                queue.sort(key=lambda w: keys[w.sequence])  # used at once
                keyed.append((keys[queue[0].sequence], model, queue))
        keyed.sort(key=lambda each: each[0])
        return [(model, queue) for _, model, queue in keyed]

    def _key(self, model: ModelSnapshot, waiting: Waiting) -> Key:
        """Smaller goes first."""
        priority = -waiting.priority if self._options.priorities else 0
        rank = self._tenants.rank(waiting.tenant) if self._options.fairness else 0
        if not self._options.slack:
            return priority, rank, not waiting.open, waiting.arrival, waiting.sequence
        due = self._due(model, waiting)
        left = self._latency.prefill(model.model, waiting.tokens - waiting.computed)
        late = due < self._now + left and self._now - waiting.arrival < OLD
        return priority, rank, late, due, waiting.sequence

    def _due(self, model: ModelSnapshot, waiting: Waiting) -> float:
        """When its first token should be there at the latest, or all of it where that is what counts."""
        if model.ttft_target and not waiting.emitted:
            return waiting.arrival + model.ttft_target
        alone = self._latency.alone(model.model, waiting.tokens, waiting.limit - waiting.tokens)
        return min(waiting.arrival + max(LEAST_DUE, self._options.stretch * alone), waiting.deadline)

    def _may_begin(self, plan: Plan, model: ModelSnapshot, waiting: Waiting) -> bool:
        """Whether one more sequence leaves the others their pace."""
        if not self._options.slack:
            return True
        count = plan.seated[model.model]
        if not count:
            return True
        cycle = self._cycle(plan) - self._latency.step(model.model, count)
        cycle += self._latency.step(model.model, count + 1)
        rank = self._tenants.rank(waiting.tenant) if self._options.fairness else 0
        return cycle <= self._cycle_limit(plan, model) * (1.0 if rank else RESERVE)

    def _cycle(self, plan: Plan) -> float:
        """Seconds of a step of every model."""
        return sum(self._latency.step(name, count) for name, count in plan.seated.items() if count)

    def _cycle_limit(self, plan: Plan, model: ModelSnapshot) -> float:
        """Seconds between two tokens that sequences of `model`, and all with a target, can bear."""
        targets = [m.tpot_target for m in plan.models.values() if m.tpot_target and m.running]
        own = model.tpot_target or FULL * self._options.stretch * self._latency.step(model.model, 1)
        least = sum(self._latency.step(name, 1) for name, count in plan.seated.items() if count)
        return max(min([own, *targets]), 2 * least)

    # Leases

    def _steps(self, plan: Plan) -> int | None:
        if not self._options.turns:
            return None
        cycle = sum(self._latency.step(m.model, len(m.running)) for m in plan.models.values() if m.running)
        most = self._options.lease_steps
        return max(min(2, most), min(most, round(self._options.turn_seconds / max(cycle, 1e-6))))
