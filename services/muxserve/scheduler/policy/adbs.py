"""ADBS: adaptive batch scheduling (Algorithm 3 of the MuxServe paper), by blocks.

Prefill first, round-robin over models, one prefill job at a time. A prompt that its model is entitled to
begin (within the model's quota, or the model holds nothing) but that does not fit stops every other
admission, and the admission of sequences to decode where that would take blocks, until it fits. Then decode
jobs, round-robin. Quotas are hard, but for a lone sequence that needs more, and follow use.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxserve.scheduler.policy import quotas
from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    Decision,
    Event,
    ModelSnapshot,
    PolicyOptions,
    Running,
    Snapshot,
    Waiting,
)
from muxserve.scheduler.policy.pace import PrefillPace
from muxserve.scheduler.policy.plan import Plan, rotated


class Adbs:
    """The policy's memory: whose turn it is, what waits, and how quotas were used."""

    name = "adbs"

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options.plain()
        self._pace = PrefillPace(self._options)
        self._last_prefill = ""
        self._last_decode = ""
        self._prefill_waiting: str | None = None
        """Model whose prompt is entitled to begin and does not fit."""
        self._use: dict[str, float] = {}
        """Block-seconds held since the last adaptation."""
        self._wanting: set[str] = set()
        """Models that had requests waiting since then."""
        self._adapted = self._seen = float("-inf")
        self._held: dict[str, int] = {}

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        plan = Plan(snapshot, self._options, self._quotas(snapshot, now), hard=not self._options.borrow)
        if plan.quotas != {m.model: m.quota for m in snapshot.models}:
            plan.decisions.append(AdaptQuotas(plan.quotas))
        self._admit(plan)
        if plan.takes_prompts:
            self._prefill(plan)
        self._decode(plan)
        plan.end_leases(
            lambda model, running: not self._paused(plan, model, running),
            lambda model: self._takes_along(plan, model),
        )
        return plan.decisions

    def observe(self, event: Event) -> None:
        """See `Policy`."""
        self._pace.observe(event)

    def _admit(self, plan: Plan) -> None:
        """Refuse what is not to be served: nothing."""

    def _prefill(self, plan: Plan) -> None:
        order = self._order(plan)
        order.sort(key=lambda each: each[0].model != self._prefill_waiting)  # stable: who waits comes first
        self._prefill_waiting = None
        for admit in (self._entitled, self._borrowing) if self._options.borrow else (self._entitled,):
            for model, queue in order:
                if self._prefill_waiting:
                    queue = [w for w in queue if w.open]
                chunks = plan.chunks(
                    model,
                    queue,
                    self._budget(plan, model),
                    lambda m, w, need, admit=admit: (  # type: ignore[misc]
                        self._may_begin(plan, m, w) and admit(plan, m, w, need)
                    ),
                )
                if chunks:
                    plan.prefill(model, chunks, self._shares(plan)[0])
                    self._last_prefill = model.model
                    return

    def _order(self, plan: Plan) -> list[tuple[ModelSnapshot, list[Waiting]]]:
        """Models with prompts in the order in which they may begin, with their queues."""
        models = (plan.models[name] for name in rotated(plan.models, self._last_prefill))
        return [(model, queue) for model in models if (queue := plan.queue(model))]

    def _budget(self, plan: Plan, model: ModelSnapshot) -> int:
        """Most prompt tokens of the next job of `model`."""
        return self._pace.budget(model.model)

    def _may_begin(self, plan: Plan, model: ModelSnapshot, waiting: Waiting) -> bool:
        """Whether a new sequence may begin, whatever there is of blocks."""
        return True

    def _steps(self, plan: Plan) -> int | None:
        """Most steps of a lease. None: as the plan has it."""
        return None

    def _shares(self, plan: Plan) -> tuple[float, float]:
        """Compute shares of a prefill job and of decode jobs beside each other."""
        return self._options.prefill_share, self._options.decode_share

    def _entitled(self, plan: Plan, model: ModelSnapshot, waiting: Waiting, need: int) -> bool:
        """Whether an entitled prompt may begin. One that does not fit waits at the head of the whole unit."""
        if not plan.within(model, need + (plan.headroom(model) if plan.hard else 0)):
            return False
        needed = need + plan.headroom()
        if needed > plan.available + plan.incoming:
            plan.reclaim(model, needed - plan.available - plan.incoming)
        if needed <= plan.available:
            return True
        self._prefill_waiting = model.model
        return False

    def _borrowing(self, plan: Plan, model: ModelSnapshot, waiting: Waiting, need: int) -> bool:
        """Whether a prompt may begin with blocks that nobody entitled to them wants now."""
        return self._prefill_waiting is None and need + plan.headroom() <= plan.available

    def _decode(self, plan: Plan) -> None:
        def start(able: list[str]) -> None:
            steps, share = self._steps(plan) or plan.turn_steps(), self._shares(plan)[1]
            for name in self._decode_order(plan, able):
                model = plan.models[name]
                batch = [r for r in plan.idle(model) if not self._paused(plan, model, r)]
                if batch and plan.decode(model, batch, steps, share, self._exclusive(name)):
                    self._join(plan, model)
                    self._decoded(model, steps)
                    return

        plan.start_leases(start)

    def _decode_order(self, plan: Plan, able: list[str]) -> list[str]:
        """The models that could decode, in the order in which they may."""
        return rotated(able, self._last_decode)

    def _exclusive(self, model: str) -> bool:
        """Whether leases of the model have the device's decode lanes for themselves."""
        return False

    def _join(self, plan: Plan, model: ModelSnapshot) -> None:
        """Have the lease that was decided on last take prompts along: none."""

    def _takes_along(self, plan: Plan, model: ModelSnapshot) -> bool:
        """Whether the model's next lease would."""
        return False

    def _decoded(self, model: ModelSnapshot, steps: int) -> None:
        """The model got a lease of so many steps."""
        self._last_decode = model.model

    def _paused(self, plan: Plan, model: ModelSnapshot, running: Running) -> bool:
        """Whether a sequence that has not decoded yet has to leave its blocks to the prefill that waits.

        Nobody is paused when nothing decodes: blocks would never come back.
        """
        if self._prefill_waiting is None or running.decoded or plan.growth(model, running, 1) == 0:
            return False
        return plan.anybody_decodes()

    def _quotas(self, snapshot: Snapshot, now: float) -> dict[str, int]:
        """Quotas to plan with: new if a model has none yet, or adapted if it is time."""
        models, total = snapshot.models, snapshot.pool.total
        current, new = quotas.in_force(models, total, self._options.min_share)
        if new:
            self._start_over(models, now)
            return current
        if self._adapted == float("-inf") or set(self._held) != set(current):
            self._start_over(models, now)
            return current
        for m in models:
            self._use[m.model] += self._held[m.model] * (now - self._seen)
            self._held[m.model] = m.held
            if any(not w.open for w in m.waiting):
                self._wanting.add(m.model)
        self._seen = now
        elapsed = now - self._adapted
        if elapsed < self._options.adapt_seconds:
            return current
        free = [m for m in models if not m.pinned_quota]
        use = {m.model: self._use[m.model] / elapsed for m in free}
        least = quotas.floor(len(free), total, self._options.min_share)
        wanting = self._wanting
        self._start_over(models, now)
        return quotas.adapted(current, use, wanting, least)

    def _start_over(self, models: Sequence[ModelSnapshot], now: float) -> None:
        self._use = dict.fromkeys((m.model for m in models), 0.0)
        self._held = {m.model: m.held for m in models}
        self._wanting = set()
        self._adapted = self._seen = now
