"""`Plan`: the working books of one decision. What policies share: chunks, leases, and who gives way.

A decision looks at few of the sequences that run, so books over all of them are made when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from muxserve.scheduler.policy.interface import (
    Chunk,
    Decision,
    DecodeJob,
    EndLease,
    ModelSnapshot,
    PolicyOptions,
    Preempt,
    PrefillJob,
    Refuse,
    Running,
    RunningJob,
    Snapshot,
    Waiting,
)

LEAST_CHUNK = 16
"""A prompt is not begun with fewer tokens than this at the end of another's chunk."""


Admit = Callable[[ModelSnapshot, Waiting, int], bool]
"""Whether a new sequence may begin, for which so many blocks are needed."""


@dataclass(slots=True)
class Holder:
    """A sequence that holds blocks or was promised some."""

    arrival: float
    sequence: int
    model: str
    blocks: int
    """Held and promised."""
    promised: int
    in_job: bool
    priority: int


class Plan:
    """Books of a snapshot as decisions change them.

    A prompt that was begun has been promised blocks for all of its known tokens: they count as held, so
    that prompts in chunks never wait for each other half-way. The oldest holder is never preempted: as long
    as every request fits the arena alone, somebody always gets on.

    With `hard` quotas a model holds no more than its own, but for one sequence that is alone and still needs
    more.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        options: PolicyOptions,
        quotas: Mapping[str, int],
        hard: bool = False,
        priorities: bool = False,
    ) -> None:
        self.options = options
        self.quotas = quotas
        """Empty: nobody has a quota, and the newest gives way first."""
        self.hard = hard
        self.decisions: list[Decision] = []
        self.models = {m.model: m for m in snapshot.models}
        self.jobs = snapshot.jobs
        self.lanes = snapshot.lanes
        self.joins = snapshot.joins
        prefilling = [job for job in snapshot.jobs if job.kind == "prefill"]
        self.prefilling = bool(prefilling)
        self.takes_prompts = all(job.ends_soon for job in prefilling)
        """Whether a prefill job may be started: none runs but one that is about to end."""
        self.closing = {m.model: m.closing for m in snapshot.models}
        """Blocks that come back when running jobs end; until then they count against their quota."""
        self.slots = {m.model: m.slots_free for m in snapshot.models}
        self.seated = {m.model: len(m.running) + len(m.begun) for m in snapshot.models}
        """Sequences that decode, or will when their prompt is computed."""
        self.held = {m.model: m.held + m.promised for m in snapshot.models}
        self.available = snapshot.pool.available - sum(m.promised for m in snapshot.models)
        self._priorities = priorities
        self._holder_list: list[Holder] | None = None
        self._gone: set[int] = set()
        """Sequences that were preempted or refused here."""
        self._started: set[int] = set()
        """Sequences in jobs that were decided here: they do not give way before the next decision."""
        self._decoding = {job.model for job in snapshot.jobs if job.kind == "decode" and not job.ends_soon}
        """Models with a decode job that is not about to end. One that is, and the one that follows it, are
        one: they run in one lane."""

    def refuse(self, waiting: Waiting, retry_after: float) -> None:
        """Turn it away."""
        self.decisions.append(Refuse(waiting.sequence, retry_after))
        self._gone.add(waiting.sequence)

    # Blocks

    def headroom(self, model: ModelSnapshot | None = None) -> int:
        """Blocks to leave for the next leases of what runs, on average: without them, admission means
        preemption soon. Of `model`, or of all."""
        blocks = 0
        for m in self.models.values() if model is None else (model,):
            if count := len(m.running):
                each = min(self.options.lease_steps / m.tokens_per_block, 1.0)
                blocks += math.ceil(count * each) * m.blocks_per_span
        return blocks

    def within(self, model: ModelSnapshot, need: int) -> bool:
        """Whether the model's quota lets it take `need` more blocks; with nothing held it always does."""
        held = self.held[model.model] + self.closing[model.model]
        return not held or held + need <= self.quotas.get(model.model, 0)

    @property
    def incoming(self) -> int:
        """Blocks that come back when running jobs end."""
        return sum(self.closing.values())

    def growth(self, model: ModelSnapshot, running: Running, steps: int) -> int:
        """Blocks that `steps` more steps take beyond those held. The last token's KV is never written."""
        groups = model.spans(min(running.length + steps - 1, running.limit - 1))
        return max(0, groups - running.groups) * model.blocks_per_span

    def _growths(self, model: ModelSnapshot, batch: Sequence[Running], steps: int) -> int:
        """Of all of `batch`. Written out: this is done for every sequence of a lease."""
        size, groups = model.tokens_per_block, 0
        for r in batch:
            last = r.length + steps
            more = -(-((last if last < r.limit else r.limit) - 1) // size) - r.groups
            if more > 0:
                groups += more
        return groups * model.blocks_per_span

    def _room(self, model: ModelSnapshot) -> int:
        """Blocks that the model may take now."""
        if not self.hard or self._alone(model):
            return self.available
        used = self.held[model.model] + self.closing[model.model]
        return min(self.available, self.quotas.get(model.model, 0) - used)

    def _alone(self, model: ModelSnapshot) -> bool:
        """Whether one sequence of the model holds blocks, or none."""
        if len(model.running) + len(model.begun) - len(self._gone) > 1:
            return False
        return len(self._left(model)) <= 1

    def _left(self, model: ModelSnapshot) -> list[Running | Waiting]:
        """What holds blocks of the model's."""
        holders: list[Running | Waiting] = [*model.running, *model.begun]
        return [r for r in holders if r.sequence not in self._gone]

    # Prefill

    def queue(self, model: ModelSnapshot) -> list[Waiting]:
        """Waiting sequences with something left to compute in the order of service: begun ones first, then by
        priority if that counts, and age."""
        left = filter(self._unfinished, model.waiting)
        if self._priorities:
            return sorted(left, key=lambda w: (not w.open, -w.priority, w.arrival, w.sequence))
        return sorted(left, key=lambda w: (not w.open, w.arrival, w.sequence))

    def _unfinished(self, waiting: Waiting) -> bool:
        """Whether there is something left to compute of it, and it did not give way here."""
        return waiting.computed < waiting.tokens and waiting.sequence not in self._gone

    def chunks(
        self,
        model: ModelSnapshot,
        queue: Iterable[Waiting],
        budget: int,
        admit: Admit,
    ) -> tuple[Chunk, ...]:
        """Chunks for up to `budget` tokens. A new sequence takes part if there is a slot and `admit(model,
        waiting, need)`; after the first that may not, only those that were begun do."""
        chunks: list[Chunk] = []
        closed = False
        for waiting in queue:
            if waiting.sequence in self._gone:  # for a model that came before in the order
                continue
            if closed and not waiting.open:
                continue
            left = waiting.tokens - waiting.computed
            size = min(left, budget)
            if size == 0 or (chunks and size < min(left, LEAST_CHUNK)):
                break
            if not waiting.open and not self._begin(model, waiting, admit):
                closed = True
                continue
            chunks.append(Chunk(waiting.sequence, waiting.computed, waiting.computed + size))
            budget -= size
        return tuple(chunks)

    def _begin(self, model: ModelSnapshot, waiting: Waiting, admit: Admit) -> bool:
        """Give a new sequence its slot and blocks, if it may have them."""
        need = model.missing(waiting)
        if self.slots[model.model] == 0 or not admit(model, waiting, need):
            return False
        self.slots[model.model] -= 1
        self.seated[model.model] += 1
        self.available -= need
        self.held[model.model] += need
        return True

    def prefill(self, model: ModelSnapshot, chunks: tuple[Chunk, ...], share: float | None = None) -> None:
        """Start that job."""
        share = self.options.prefill_share if share is None else share
        self.decisions.append(PrefillJob(model.model, chunks, share, self._borrows(model)))
        self.prefilling, self.takes_prompts = True, False
        self._started.update(chunk.sequence for chunk in chunks)

    # Decode

    def idle(self, model: ModelSnapshot) -> Sequence[Running]:
        """Sequences that a decode job may have, oldest first: those in none or in one that ends soon."""
        gone = self._gone
        return [r for r in model.idle if r.sequence not in gone] if gone else model.idle

    def anybody_decodes(self) -> bool:
        """Whether some sequence that was in a decode job before is still to go on."""
        gone = self._gone
        return any(r.decoded and r.sequence not in gone for m in self.models.values() for r in m.running)

    def decodable(self) -> list[str]:
        """Models that could start a decode job, by name. None if there is one for every lane that is not
        about to end: which model comes next is decided as late as can be."""
        if len(self._decoding) >= self.lanes:
            return []
        return [
            name
            for name, m in self.models.items()
            if name not in self._decoding and m.any_idle and (not self._gone or self.idle(m))
        ]

    def leases(self, model: str) -> int:
        """Decode jobs of the model that run, or were decided on."""
        decided = sum(isinstance(d, DecodeJob) and d.model == model for d in self.decisions)
        return decided + sum(job.kind == "decode" and job.model == model for job in self.jobs)

    def turn_steps(self) -> int:
        """Steps of a lease: shorter where models take turns, so that none pauses for long."""
        active = sum(bool(m.running) for m in self.models.values())
        most = self.options.lease_steps
        return max(min(2, most), most // max(1, active))

    def decode(
        self,
        model: ModelSnapshot,
        batch: Sequence[Running],
        steps: int | None = None,
        share: float | None = None,
        exclusive: bool = False,
    ) -> bool:
        """Start a decode job with those of `batch` (oldest first) that get blocks, with as many of `steps`
        as fit; `exclusive`: with no other beside it.

        If not even one step of all fits, the newest sequences that should give way are preempted. Returns
        whether a job was started.
        """
        if not batch:
            return False
        steps = max(1, min(steps or self.turn_steps(), max(r.limit - r.length for r in batch)))
        room, total = self._room(model), self._growths(model, batch, steps)
        while steps > 1 and total > room:
            steps //= 2
            total = self._growths(model, batch, steps)
        if total <= room:
            self.available -= total
            self.held[model.model] += total
            sequences = tuple(r.sequence for r in batch)
        elif any(r.renew for r in batch):
            return False  # nobody gives way for a job that has time until the one before it ends
        else:
            sequences = self._squeeze(model, batch, steps)
        if not sequences:
            return False
        share = self.options.decode_share if share is None else share
        borrow = self._borrows(model)
        self.decisions.append(DecodeJob(model.model, sequences, steps, share, borrow, exclusive))
        self._decoding.add(model.model)
        self._started.update(sequences)
        return True

    def joinable(self, waiting: Waiting) -> bool:
        """Whether what is left of its prompt could be computed in a decode job."""
        ours = waiting.in_job or waiting.sequence in self._started
        return not ours and self._unfinished(waiting)

    def join(self, model: ModelSnapshot, queue: Iterable[Waiting], budget: int, admit: Admit) -> None:
        """Have the decode job that was decided on last take along those of `queue` whose prompts are, what is
        left of them, no more than `budget` tokens together, if there are blocks for all of its steps."""
        job = self.decisions[-1]
        assert isinstance(job, DecodeJob)
        chunks = []
        for waiting in queue:
            left = waiting.tokens - waiting.computed
            if left > budget or not self.joinable(waiting):
                continue
            most = waiting.tokens + job.steps
            most = (min(most, waiting.limit) if waiting.limit else most) - 1
            held = max(waiting.groups, model.spans(waiting.tokens))
            more = max(0, model.spans(most) - held) * model.blocks_per_span
            if more + (0 if waiting.open else model.missing(waiting)) > self._room(model):
                continue
            if not waiting.open and not self._begin(model, waiting, admit):
                break
            self.available -= more
            self.held[model.model] += more
            budget -= left
            chunks.append(Chunk(waiting.sequence, waiting.computed, waiting.tokens))
        if chunks:
            self.decisions[-1] = replace(job, prompts=tuple(chunks))
            self._started.update(chunk.sequence for chunk in chunks)

    def start_leases(self, start: Callable[[list[str]], object]) -> None:
        """Call `start` with the models that could decode, to give one of them a lease, until it decides
        nothing more: a preemption alone may let somebody decode who was passed over."""
        settled = False
        while not settled and (able := self.decodable()):
            decided = len(self.decisions)
            start(able)
            settled = len(self.decisions) == decided

    def end_leases(
        self,
        joins: Callable[[ModelSnapshot, Running], bool],
        takes_along: Callable[[ModelSnapshot], bool] = lambda _: False,
    ) -> None:
        """End leases that keep a sequence for which `joins` from its batch, and those whose model has prompts
        that the next one `takes_along`. Each does a step at least: models whose batches change all the time
        get on too."""
        for job in self._endable():
            model = self.models[job.model]
            joiners = (
                r
                for r in self.idle(model)
                if not r.in_job
                and (r.sequence in self._started or self.growth(model, r, 1) <= self._room(model))
            )
            if any(joins(model, running) for running in joiners) or takes_along(model):
                self.decisions.append(EndLease(job.job))

    def end_all_leases(self) -> None:
        """End every lease after the step that runs, for a job that is to come instead."""
        self.decisions += [EndLease(job.job) for job in self._endable()]

    def _endable(self) -> list[RunningJob]:
        """Leases that would not end by themselves before an order to end them arrives."""
        return [
            job
            for job in self.jobs
            if job.kind == "decode"
            and not (job.ending or job.last_step or job.fresh)
            and job.model in self.models
        ]

    def _borrows(self, model: ModelSnapshot) -> bool:
        """Whether a job of the model may hold blocks above its quota."""
        used = self.held[model.model] + self.closing[model.model]
        return not self.hard or used > self.quotas.get(model.model, 0)

    # Giving way

    def reclaim(self, model: ModelSnapshot, short: int) -> None:
        """Preempt the newest sequences of other models, while these are above quota, if that frees
        `short`."""
        if all(self.held[name] <= self.quotas.get(name, 0) for name in self.models if name != model.model):
            return
        held = dict(self.held)
        freed, victims = 0, []
        for holder in reversed(self._holders):
            if freed >= short:
                break
            if holder.model == model.model or not self._may_yield(holder):
                continue
            if held[holder.model] > self.quotas.get(holder.model, 0):
                held[holder.model] -= holder.blocks
                freed += holder.blocks
                victims.append(holder)
        if freed >= short:
            for victim in victims:
                self._preempt(victim)

    @property
    def _holders(self) -> list[Holder]:
        """Who gives way last comes first: the oldest of all, then by priority if that counts, and age."""
        if self._holder_list is None:
            found = sorted(
                (holder for m in self.models.values() for holder in _holders(m)),
                key=lambda holder: (holder.arrival, holder.sequence),
            )
            if self._priorities:
                found[1:] = sorted(found[1:], key=lambda holder: -holder.priority)
            self._holder_list = found
        return self._holder_list

    def _squeeze(self, model: ModelSnapshot, batch: Sequence[Running], steps: int) -> tuple[int, ...]:
        """Those of `batch` that get blocks for `steps` steps after others have given way."""
        taken = []
        for running in batch:
            need = self.growth(model, running, steps)
            if running.sequence in self._gone or not self._make_room(model, running, need):
                continue
            self.available -= need
            self.held[model.model] += need
            taken.append(running.sequence)
        return tuple(sequence for sequence in taken if sequence not in self._gone)

    def _make_room(self, model: ModelSnapshot, running: Running, need: int) -> bool:
        """Preempt until `need` blocks are to be had. False: not yet, or `running` itself has given way."""
        while need > self._room(model):
            own = need <= self.available
            coming = self.closing[model.model] if own else self.incoming
            if need <= self._room(model) + coming:
                return False
            victim = self._victim(model, need, own)
            if victim is None:
                return False
            self._preempt(victim)
            if victim.sequence == running.sequence:
                return False
        return True

    def _victim(self, model: ModelSnapshot, need: int, own: bool) -> Holder | None:
        """The newest sequence of `model` if its `own` quota is what is short; else of the model most above
        its quota, `need` counted, else of the unit."""
        if own:
            mine = [holder for holder in self._holders if holder.model == model.model]
            return next((holder for holder in reversed(mine[1:]) if self._may_yield(holder)), None)
        over = {
            name: self.held[name] + (need if name == model.model else 0) - quota
            for name, quota in self.quotas.items()
            if name in self.held
        }
        for name in sorted((n for n in over if over[n] > 0), key=lambda n: -over[n]):
            for holder in reversed(self._holders):
                if holder.model == name and self._may_yield(holder):
                    return holder
        return next((holder for holder in reversed(self._holders) if self._may_yield(holder)), None)

    def _may_yield(self, holder: Holder) -> bool:
        sequence = holder.sequence
        senior = self._holders[0].sequence
        return sequence != senior and sequence not in self._gone and sequence not in self._started

    def _preempt(self, holder: Holder) -> None:
        self.decisions.append(Preempt(holder.sequence))
        self._gone.add(holder.sequence)
        self.seated[holder.model] -= 1
        self.held[holder.model] -= holder.blocks
        if holder.in_job:
            self.closing[holder.model] += holder.blocks - holder.promised
            self.available += holder.promised
        else:
            self.available += holder.blocks


def rotated(names: Iterable[str], last: str) -> list[str]:
    """`names` in round-robin order: those after `last` first."""
    ordered = sorted(names)
    return [n for n in ordered if n > last] + [n for n in ordered if n <= last]


def _holders(model: ModelSnapshot) -> Iterable[Holder]:
    for w in model.begun:
        promised = model.missing(w)
        blocks = w.groups * model.blocks_per_span + promised
        yield Holder(w.arrival, w.sequence, model.model, blocks, promised, w.in_job, w.priority)
    for r in model.running:
        blocks = r.groups * model.blocks_per_span
        yield Holder(r.arrival, r.sequence, model.model, blocks, 0, r.in_job, r.priority)
