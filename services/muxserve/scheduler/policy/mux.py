"""`mux`, the default: ADBS with an eye on what each request was promised. Every addition has its switch.

slack       Every request has a time at which it is due: its model's TTFT target, or `stretch` times what it
            takes alone on the device. Prompts go by that, so that short requests do not wait behind long
            ones; those that are late already let those pass that can still make it, until they get old. No
            more sequences decode at once than keeps everybody's pace, but where a queue is lost (`Rush`).
turns       Models decode in proportion to the steps that their sequences need to be in time (`Turns`), few
            at a time if turns are dear, side by side or one after the other (`Latency.cycle`).
chunked     Prompts come in chunks short enough that the next urgent one is soon served.
gather      Short prompts are computed in a lease of their model, in one pass with what decodes, where that
            does not fill its lane; or wait for others to share a job with, a token's time or so (`Company`).
shares      Where models have targets for time per output token, prefill gets what compute these leave.
borrow, priorities, fairness, admission: see `PolicyOptions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from muxserve.scheduler.policy.adbs import Adbs
from muxserve.scheduler.policy.admission import Crowd, Forecast, retry_after
from muxserve.scheduler.policy.company import Company
from muxserve.scheduler.policy.dues import Dues, Rush
from muxserve.scheduler.policy.interface import (
    AskAgain,
    Decision,
    Event,
    JobEnded,
    ModelSnapshot,
    PolicyOptions,
    PrefillJob,
    Snapshot,
    Waiting,
)
from muxserve.scheduler.policy.latency import Cycle, Latency
from muxserve.scheduler.policy.pace import LEAST, PrefillPace
from muxserve.scheduler.policy.plan import Plan
from muxserve.scheduler.policy.slip import Slip
from muxserve.scheduler.policy.tenants import Tenants
from muxserve.scheduler.policy.turns import Turns

PRESSED_PACE = 0.45
"""Part of `stretch` by which sequences that decode may slow each other down where requests are refused: who
was admitted is to be in time, and waiting takes the rest."""
RESERVE = 2.0
"""How far those may go beyond that who had little, or are not the ones that make it crowded."""
BRIEF = 2.0
"""How many times as long as one for a single token a prefill job of the ones takes that do, at most."""
OLD = 20.0
"""Seconds after which a late request is served before any other."""
LEAST_PART = 0.2
"""Part of the time, and of the device, that prefill and decode have at least when targets cannot be met."""
LOST = 10.0
"""By how much the pace may be slower where most of what waits will be late whatever is done."""
LONGER = 4.0
"""By how much turns are longer then: each one begun costs some milliseconds."""

Key = tuple[object, ...]


class Mux(Adbs):
    """ADBS's memory, and what was learned of the device and of tenants."""

    name = "mux"

    def __init__(self, options: PolicyOptions) -> None:
        super().__init__(options)
        self._options = options
        self._pace = PrefillPace(options)
        self._latency = Latency()
        self._forecast = Forecast(self._latency)
        self._dues = Dues(options, self._latency, self._forecast)
        self._turns = Turns(options, self._latency, self._dues)
        self._slip = Slip()
        self._tenants = Tenants()
        self._company = Company(self._latency)
        self._now = 0.0
        self._round = Cycle(0.0, frozenset())
        """In which all that decode do a step."""
        self._lost = False
        """Whether most of what waits will be late, whatever is done."""
        self._brief: set[str] = set()
        """Models of which only the ones that make it crowded have prompts."""
        self._urgent = False
        """Whether the prefill job that runs has the device for itself: somebody makes it crowded, and the
        first tokens of others are not to wait for what that one decodes."""
        self._rested = True
        """Whether something decoded since the last one that had: prompts do not stop it for good."""
        self._rest_until = 0.0
        """Until when no prompt is computed, for the sake of what decodes."""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """See `Policy`."""
        self._now = now
        if self._options.fairness:
            self._tenants.look(snapshot.models, now)
        if self._options.gather:
            self._company.look(snapshot.models)
        return super().decide(snapshot, now)

    def observe(self, event: Event) -> None:
        """See `Policy`."""
        super().observe(event)
        self._forecast.observe(event)
        if isinstance(event, JobEnded):
            self._latency.observe(event)
            self._tenants.observe(event)
            if event.kind == "decode":
                self._rested = True
                self._slip.stepped(event.model, event.steps)
                self._turns.observe(event)

    # Admission

    def _admit(self, plan: Plan) -> None:
        """Refuse new requests that cannot be finished before their deadline."""
        if not self._options.admission:
            return
        fresh = {
            w.sequence
            for model in plan.models.values()
            for w in model.waiting
            if w.deadline < math.inf and not (w.open or w.emitted or self._forecast.admitted(w.sequence))
        }
        if not fresh:
            return
        crowds = self._crowds(plan)
        self._forecast.look(self._now, plan.models.values(), lambda name: crowds[name].now)
        # By when they are due: what is due before is ahead.
        queue = sorted(
            ((self._dues.waiting(m, w), w.sequence, m, w) for m in plan.models.values() for w in m.waiting),
            key=lambda each: each[:2],
        )
        ahead, wanted = 0.0, 0
        for _, sequence, model, waiting in queue:
            prompt = self._latency.prefill(model.model, waiting.tokens - waiting.computed)
            crowd = crowds[model.model]
            if sequence in fresh and self._too_late(plan, model, waiting, ahead, wanted, crowd, prompt):
                continue
            ahead += prompt
            wanted += not waiting.open

    def _crowds(self, plan: Plan) -> dict[str, Crowd]:
        """What decodes, as each model's sequences see it."""
        to_come = {name: sum(not w.open for w in model.waiting) for name, model in plan.models.items()}
        now, then = self._expected(plan), self._expected(plan, to_come)
        growth = max(0.0, then - now) / max(1, sum(to_come.values()))
        return {
            name: Crowd(slip * now, slip * growth, self._cycle_limit(plan, name) * RESERVE)
            for name in plan.models
            for slip in [self._slip.of(name)]
        }

    def _too_late(
        self,
        plan: Plan,
        model: ModelSnapshot,
        waiting: Waiting,
        ahead: float,
        wanted: int,
        crowd: Crowd,
        prompt: float,
    ) -> bool:
        """Refuse a request if it would be. ahead, wanted, crowd: as in `Forecast.estimate`."""
        output = self._dues.output(model, waiting)
        estimate = self._forecast.estimate(
            plan.models.values(),
            ahead,
            sum(plan.seated.values()),
            wanted,
            crowd,
            (prompt, output, self._latency.lone_step(model.model)),
        )
        late = self._now + self._forecast.seconds(estimate) - waiting.deadline
        if late > 0 and self._forecast.known(model.model):
            plan.refuse(waiting, retry_after(late))
            self._forecast.refuse()
            return True
        self._forecast.admit(waiting, self._now, estimate)
        return False

    # Prompts

    def _prefill(self, plan: Plan) -> None:
        if self._now < self._rest_until and self._target(plan):
            if any(m.waiting for m in plan.models.values()):
                plan.decisions.append(AskAgain(self._rest_until))
            return
        super()._prefill(plan)
        if isinstance(job := plan.decisions[-1] if plan.decisions else None, PrefillJob):
            self._rest_until = self._now + self._duty(plan, job)
            self._urgent = self._rested and self._tenants.crowded and self._calm(plan, job)
            self._rested = not self._urgent

    def _calm(self, plan: Plan, job: PrefillJob) -> bool:
        """Whether nothing in the job is of a tenant that makes it crowded."""
        begun = {chunk.sequence for chunk in job.chunks}
        tenants = {w.tenant for w in plan.models[job.model].waiting if w.sequence in begun}
        return not any(self._tenants.crowds(tenant) for tenant in tenants)

    def _target(self, plan: Plan) -> float:
        """The shortest time per output token that something which decodes should have. 0: none."""
        if not self._options.shares:
            return 0.0
        return min((m.tpot_target for m in plan.models.values() if m.tpot_target and m.running), default=0.0)

    def _duty(self, plan: Plan, job: PrefillJob) -> float:
        """Seconds until the next prefill job, so that those that decode keep their target on average."""
        if not (target := self._target(plan)):
            return 0.0
        cycle = self._cycle(plan)
        seconds = self._latency.prefill(job.model, sum(c.end - c.start for c in job.chunks))
        extra = cycle * (self._latency.beside("decode") - 1)
        part = max(LEAST_PART, min(1.0, (target - cycle) / max(extra, 1e-9)))
        return seconds * self._latency.beside("prefill") / part if part < 1 else 0.0

    def _shares(self, plan: Plan) -> tuple[float, float]:
        """What decode needs of the device to keep its target, and the rest."""
        if not (target := self._target(plan)):
            return super()._shares(plan)
        decode = min(1 - LEAST_PART, max(LEAST_PART, self._cycle(plan) / target))
        return 1 - decode, decode

    def _order(self, plan: Plan) -> list[tuple[ModelSnapshot, list[Waiting]]]:
        if not (self._options.slack or self._options.fairness):
            return super()._order(plan)
        keyed, rush = [], Rush()
        self._brief.clear()
        for model in plan.models.values():
            if queue := plan.queue(model):
                times, keys = self._sort(model, queue)
                if self._tenants.crowded:
                    queue = self._uncrowded(plan, model, queue)
                    if not queue:
                        continue
                for w in queue:
                    rush.add(w, *times[w.sequence])
                keyed.append((keys[queue[0].sequence], model, queue))
        keyed.sort(key=lambda each: each[0])
        # Where somebody makes it crowded, others are not to pay for serving all of that one's.
        rushing = self._options.slack and not self._tenants.crowded
        self._lost = rushing and rush.lost(self._together(plan))
        order = [(model, queue) for _, model, queue in keyed]
        return self._gathered(plan, order) if self._options.gather else order

    def _sort(
        self, model: ModelSnapshot, queue: list[Waiting]
    ) -> tuple[dict[int, tuple[float, float]], dict[int, Key]]:
        """Put the queue in order; when each is due and how long it takes alone, and what it goes by."""
        times = {w.sequence: (self._dues.waiting(model, w), self._dues.left(model, w)) for w in queue}
        keys = {w.sequence: self._key(w, *times[w.sequence]) for w in queue}
        queue.sort(key=lambda w: keys[w.sequence])
        return times, keys

    def _uncrowded(self, plan: Plan, model: ModelSnapshot, queue: list[Waiting]) -> list[Waiting]:
        """Those of the queue that may share a job while somebody makes it crowded: no job is made longer by
        prompts of that one's, and one of them alone is brief and not sent ahead, as others' may come."""
        if calm := [w for w in queue if not self._tenants.crowds(w.tenant)]:
            return calm
        self._brief.add(model.model)
        return [] if plan.prefilling else queue

    def _gathered(
        self, plan: Plan, order: list[tuple[ModelSnapshot, list[Waiting]]]
    ) -> list[tuple[ModelSnapshot, list[Waiting]]]:
        """The prompts that do not wait for a lease to take them along, or for others to share a job with:
        none does where nothing decodes meanwhile, nor where somebody makes it crowded."""
        decoding = any(job.kind == "decode" for job in plan.jobs)
        if not order or not decoding or self._lost or self._tenants.crowded:
            return order
        pace = self._expected(plan)
        ready, later = [], []
        for model, queue in order:
            if room := self._room_to_join(plan, model):
                until = [self._company.lease_until(model, w, pace, room) for w in queue]
            else:
                until = [self._company.until(model, queue, pace)] * len(queue)
            if now := [w for w, at in zip(queue, until, strict=True) if at <= self._now]:
                ready.append((model, now))
            later += [at for at in until if at > self._now]
        if later and not ready:
            plan.decisions.append(AskAgain(min(later)))
        return ready

    def _room_to_join(self, plan: Plan, model: ModelSnapshot) -> int:
        """Most tokens of prompts that a lease of the model takes along: as much again as a step and a prefill
        job take anyway, so that nobody's next token is late by much. 0: none."""
        joins = plan.joins and self._options.gather and model.running and not self._tenants.crowded
        if not joins or self._target(plan) or self._fills_a_lane(plan, model):
            return 0
        name, rows = model.model, len(model.running)
        much = self._latency.step(name, rows) + self._latency.prefill(name, 1)
        return max(0, min(self._latency.prompt(name, much), self._options.chunk_tokens - rows))

    def _fills_a_lane(self, plan: Plan, model: ModelSnapshot) -> bool:
        """Whether the model's steps take longer than those of all others, which have the lanes beside its
        own: what else its lane did would make it later, while the others have more steps than they need."""
        others = [m for m in plan.models.values() if m.running and m is not model]
        if plan.lanes == 1 or not others:
            return False
        rest = sum(self._latency.step(m.model, len(m.running), together=True) for m in others)
        mine = self._latency.step(model.model, len(model.running), together=True)
        return mine > rest / (plan.lanes - 1)

    def _join(self, plan: Plan, model: ModelSnapshot) -> None:
        if not (model.waiting and (room := self._room_to_join(plan, model))):
            return
        queue = plan.queue(model)
        self._sort(model, queue)
        plan.join(
            model,
            queue,
            room,
            lambda m, w, need: self._may_begin(plan, m, w) and self._borrowing(plan, m, w, need),
        )

    def _takes_along(self, plan: Plan, model: ModelSnapshot) -> bool:
        if not (model.waiting and (room := self._room_to_join(plan, model))):
            return False
        short = [w for w in model.waiting if w.tokens - w.computed <= room and plan.joinable(w)]
        if any(w.open for w in short):
            return True
        if not short or not plan.slots[model.model]:
            return False
        strain = self._strain(plan, model)
        return any(
            strain <= self._reserve(w.tenant) and self._borrowing(plan, model, w, model.missing(w))
            for w in short
        )

    def _key(self, waiting: Waiting, due: float, left: float) -> Key:
        """Smaller goes first. left: seconds that it takes alone until what is due is there."""
        priority = -waiting.priority if self._options.priorities else 0
        rank = self._tenants.rank(waiting.tenant) if self._options.fairness else 0
        if not self._options.slack:
            return priority, rank, not waiting.open, waiting.arrival, waiting.sequence
        late = due < self._now + left and self._now - waiting.arrival < OLD
        return priority, rank, late, due, waiting.sequence

    def _may_begin(self, plan: Plan, model: ModelSnapshot, waiting: Waiting) -> bool:
        """Whether one more sequence leaves the others their pace."""
        return self._strain(plan, model) <= self._reserve(waiting.tenant)

    def _strain(self, plan: Plan, model: ModelSnapshot) -> float:
        """Pace of all that decode, with one more sequence of the model, over what `_cycle_limit` allows."""
        if not self._options.slack or not plan.seated[model.model]:
            return 0.0
        pace = self._expected(plan, {model.model: 1}) * self._slip.of_all(plan.seated)
        return pace / self._cycle_limit(plan, model.model)

    def _reserve(self, tenant: str) -> float:
        """How far beyond the limit of `_cycle_limit` sequences of the tenant may go."""
        tenants = self._tenants
        had_much = tenants.crowds(tenant) if tenants.crowded else tenants.rank(tenant) != 0
        return 1.0 if self._options.fairness and had_much else RESERVE

    def _cycle(self, plan: Plan) -> float:
        """Seconds in which every model does a step."""
        return self._latency.cycle(_batches(plan.seated), plan.lanes).seconds

    def _expected(self, plan: Plan, more: Mapping[str, int] | None = None) -> float:
        """Seconds in which all that decode get a token, as the fits have it, with prefill beside them part of
        the time; with so many more sequences of each model."""
        more = more or {}
        batches = _batches({name: count + more.get(name, 0) for name, count in plan.seated.items()})
        cycle = self._latency.cycle(batches, plan.lanes).seconds
        return cycle + self._forecast.beside * (self._latency.busy_cycle(batches, plan.lanes) - cycle)

    def _together(self, plan: Plan) -> float:
        """How many times as fast what decodes gets on as if one sequence decoded after the other."""
        alone = sum(count * self._latency.lone_step(name) for name, count in plan.seated.items())
        return alone / max(self._expected(plan), 1e-9)

    def _cycle_limit(self, plan: Plan, model: str) -> float:
        """Seconds in which all that decode may get a token, sequences of `model` among them.

        As models have turns in proportion to what they need, each limits it by its own part of a cycle; so
        it is the same whichever model wants one more.
        """
        batches = dict(_batches(plan.seated))
        batches.setdefault(model, 1)
        limits = {name: self._own_limit(plan.models[name]) for name in batches}
        if self._options.turns:
            steps = {name: self._latency.step(name, count) for name, count in batches.items()}
            limit = sum(steps.values()) / sum(seconds / limits[name] for name, seconds in steps.items())
        else:
            limit = min(limits.values())
        lone = [(name, 1) for name, _ in _batches(plan.seated)]
        least = self._latency.cycle(lone, plan.lanes).seconds
        if self._forecast.pressed:
            limit *= PRESSED_PACE
        # Where what waits will be late whatever is done, pace gives way to throughput.
        return max(limit, 2 * least) * (LOST if self._lost else 1.0)

    def _own_limit(self, model: ModelSnapshot) -> float:
        """Seconds between two tokens that sequences of `model` can bear."""
        return model.tpot_target or self._options.stretch * self._latency.lone_step(model.model)

    def _budget(self, plan: Plan, model: ModelSnapshot) -> int:
        if not self._options.chunked or self._lost:
            return super()._budget(plan, model)
        budget = self._pace.budget(model.model, self._options.turn_seconds)
        if model.model in self._brief:
            longer = (BRIEF - 1) * self._latency.prefill(model.model, 1)
            return min(budget, max(LEAST, self._latency.prompt(model.model, longer)))
        return budget

    # Leases

    def _decode(self, plan: Plan) -> None:
        if self._urgent and plan.prefilling:
            plan.end_all_leases()
            return
        batches = [(m.model, len(m.running)) for m in plan.models.values() if m.running]
        self._round = self._latency.cycle(batches, plan.lanes if self._options.turns else 1)
        self._slip.look(plan.models.values(), self._now, lambda: self._expected(plan))
        if len(self._round.exclusive) == len(batches):
            plan.lanes = 1
        super()._decode(plan)

    def _decode_order(self, plan: Plan, able: list[str]) -> list[str]:
        if not self._options.turns:
            return super()._decode_order(plan, able)
        return self._turns.order(plan, able, self._steps(plan) or 1, self._now)

    def _steps(self, plan: Plan) -> int | None:
        if not self._options.turns:
            return None
        most = self._options.lease_steps
        active = [m for m in plan.models.values() if m.running]
        if len(active) == 1:  # nobody waits for a turn
            return most
        turn = self._options.turn_seconds * (LONGER if self._lost else 1.0)
        steps = round(turn / max(self._round.seconds, 1e-6))
        return max(min(2, most), min(most, steps))

    def _exclusive(self, model: str) -> bool:
        return model in self._round.exclusive


def _batches(seated: Mapping[str, int]) -> list[tuple[str, int]]:
    """Models with sequences, and how many."""
    return [(name, count) for name, count in seated.items() if count]
