"""Spatial partition, the baseline: every model has its own part of memory and compute, whatever others do.

What a user has who runs one engine per model on a fixed part of the machine. Blocks: a hard quota,
proportional to rate × blocks per token, or equal where no rates are known; never borrowed, never adapted; a
request that could not be served in its model's part alone is refused. Compute: a part of the device's time,
proportional to rate, or equal. As many jobs run at a time, of different models, as the device has lanes, at
full speed, and each is charged to its model's account, half of its time where two run. Accounts fill by
part × time and hold `BURST` seconds at most: a model with an account below zero pauses, even if nobody else
does anything. So over any time t a model's jobs take no more than part × t + BURST of the device and the last
job's excess. A job at full speed followed by a pause is a little better for latency than the same job on a
slow slice; the comparison errs in favour of this policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxserve.scheduler.policy import quotas
from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    AskAgain,
    Decision,
    DecodeJob,
    Event,
    JobEnded,
    ModelSnapshot,
    PolicyOptions,
    PrefillJob,
    Snapshot,
    Waiting,
)
from muxserve.scheduler.policy.pace import PrefillPace
from muxserve.scheduler.policy.plan import Plan, rotated
from muxserve.scheduler.policy.serial import has_work, take_turn

BURST = 0.1
"""Seconds of device time that an account may hold, and that a lease should take."""


class Spatial:
    """Remembers the parts, the accounts and how long steps take."""

    name = "spatial"

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options.plain()
        self._pace = PrefillPace(self._options)
        self._step: dict[str, float] = {}
        """Seconds of each model's last step."""
        self._account: dict[str, float] = {}
        """Seconds of device time."""
        self._charged: list[tuple[str, str, float]] = []
        """(model, kind, estimate) of jobs that have not ended."""
        self._lanes = 1
        self._seen = 0.0
        self._last = ""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        models = snapshot.models
        parts = quotas.compute_parts(models, self._options.min_share)
        self._fill(parts, now)
        blocks, new = quotas.in_force(models, snapshot.pool.total, self._options.min_share)
        plan = Plan(snapshot, self._options, blocks, hard=True)
        if new:
            plan.decisions.append(AdaptQuotas(blocks))
        for model in models:
            for waiting in model.waiting:
                if self._oversize(plan, model, waiting):
                    plan.refuse(waiting, 0.0)
        if not snapshot.jobs:
            self._charged.clear()
        self._lanes = snapshot.lanes
        soon = {job.model for job in snapshot.jobs if job.kind == "decode" and job.ends_soon}
        busy = {job.model for job in snapshot.jobs if job.model not in soon}
        while len(busy) < snapshot.lanes and (name := self._start(plan, busy, soon)):
            busy.add(name)
        if not snapshot.jobs and not busy:
            self._pause(plan, parts, now)
        return plan.decisions

    def observe(self, event: Event) -> None:
        """See `Policy`."""
        self._pace.observe(event)
        if not isinstance(event, JobEnded):
            return
        if event.kind == "decode" and event.steps:
            self._step[event.model] = event.seconds / event.steps
        for index, (model, kind, estimate) in enumerate(self._charged):
            if (model, kind) == (event.model, event.kind):
                del self._charged[index]
                beside = max(event.beside, event.together) if self._lanes > 1 else 0.0
                seconds = event.seconds * (1 - beside * (1 - 1 / self._lanes))
                self._account[model] = self._account.get(model, 0.0) + estimate - seconds
                break

    def _fill(self, parts: dict[str, float], now: float) -> None:
        elapsed, self._seen = now - self._seen, now
        self._account = {
            name: min(BURST, self._account.get(name, 0.0) + part * elapsed) for name, part in parts.items()
        }

    def _oversize(self, plan: Plan, model: ModelSnapshot, waiting: Waiting) -> bool:
        most = model.spans(max(waiting.limit - 1, waiting.tokens)) * model.blocks_per_span
        return not waiting.open and most > plan.quotas[model.model]

    def _start(self, plan: Plan, busy: set[str], soon: set[str]) -> str:
        """Give a lane to the next model that may have it, and return its name; empty: there is none. `busy`
        have one; those that will `soon` be done may have only a job that can wait for that."""

        def fits(model: ModelSnapshot, waiting: Waiting, need: int) -> bool:
            return plan.within(model, need + plan.headroom(model))

        for name in rotated(plan.models, self._last):
            model = plan.models[name]
            if name in busy or self._account[name] < 0 or not has_work(model):
                continue
            if model.waiting and name in soon:
                continue
            steps = max(1, min(self._options.lease_steps, int(BURST / self._step.get(name, BURST))))
            budget = 0 if plan.prefilling else self._pace.budget(name)
            if take_turn(plan, model, budget, steps, fits):
                self._charge(plan.decisions[-1])
                self._last = name
                return name
        return ""

    def _charge(self, job: Decision) -> None:
        match job:
            case PrefillJob(model, chunks):
                kind, seconds = "prefill", self._pace.seconds(model, sum(c.end - c.start for c in chunks))
            case DecodeJob(model, _, steps):
                kind, seconds = "decode", steps * self._step.get(model, BURST)
            case _:
                return
        seconds /= self._lanes
        self._charged.append((model, kind, seconds))
        self._account[model] -= seconds

    def _pause(self, plan: Plan, parts: dict[str, float], now: float) -> None:
        """Say when the first of those that pause may go on."""
        waits = [
            now - self._account[name] / parts[name] + 1e-4
            for name, model in plan.models.items()
            if has_work(model) and self._account[name] < 0
        ]
        if waits:
            plan.decisions.append(AskAgain(min(waits)))
