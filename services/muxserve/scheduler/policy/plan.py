"""`Plan`: the working books of one decision. What policies share: chunks, leases, and who gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from muxserve.scheduler.policy.interface import (
    Chunk,
    Decision,
    DecodeJob,
    EndLease,
    ModelSnapshot,
    PolicyOptions,
    Preempt,
    PrefillJob,
    Running,
    Snapshot,
    Waiting,
)

LEAST_CHUNK = 16
"""A prompt is not begun with fewer tokens than this at the end of another's chunk."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A sequence that holds blocks or was promised some."""

    arrival: float
    sequence: int
    model: str
    blocks: int
    """Held and promised."""
    promised: int
    in_job: bool


class Plan:
    """Books of a snapshot as decisions change them.

    A prompt that was begun has been promised blocks for all of its known tokens: they count as held, so
    that prompts in chunks never wait for each other half-way. The oldest holder is never preempted: as long
    as every request fits the arena alone, somebody always gets on.
    """

    def __init__(self, snapshot: Snapshot, options: PolicyOptions, quotas: Mapping[str, int]) -> None:
        self.options = options
        self.quotas = quotas
        """Empty: nobody has a quota, and the newest gives way first."""
        self.decisions: list[Decision] = []
        self.models = {m.model: m for m in snapshot.models}
        self._running = {
            m.model: sorted(m.running, key=lambda r: (r.arrival, r.sequence)) for m in snapshot.models
        }
        self.jobs = snapshot.jobs
        self.prefilling = any(job.kind == "prefill" for job in snapshot.jobs)
        self.incoming = sum(m.closing for m in snapshot.models)
        """Blocks that come back when running jobs end."""
        self.slots = {m.model: m.slots_free for m in snapshot.models}
        self.holders = sorted(
            (holder for m in snapshot.models for holder in _holders(m)),
            key=lambda holder: (holder.arrival, holder.sequence),
        )
        """Oldest first."""
        self.held = {m.model: m.held for m in snapshot.models}
        self.available = snapshot.pool.available
        for holder in self.holders:
            self.held[holder.model] += holder.promised
            self.available -= holder.promised
        self._senior = self.holders[0].sequence if self.holders else None
        self._preempted: set[int] = set()
        self._started: set[int] = set()
        """Sequences in jobs that were decided here: they do not give way before the next decision."""
        self._decoding = {job.model for job in snapshot.jobs if job.kind == "decode" and not job.ends_soon}

    # Prefill

    def queue(self, model: ModelSnapshot) -> list[Waiting]:
        """Waiting sequences in the order of service: begun ones first, then by priority and age."""
        left = (w for w in model.waiting if w.sequence not in self._preempted)
        return sorted(left, key=lambda w: (not w.open, -w.priority, w.arrival, w.sequence))

    def need(self, model: ModelSnapshot, waiting: Waiting) -> int:
        """Blocks that beginning `waiting` takes: for all its known tokens."""
        return (_spans(model, waiting.tokens) - waiting.groups) * model.blocks_per_span

    def headroom(self) -> int:
        """Blocks to leave for the next leases of what runs; without it, admission means preemption soon."""
        return sum(
            self.growth(m, r, self.options.lease_steps)
            for m in self.models.values()
            for r in self.idle(m, True)
        )

    def chunks(
        self,
        model: ModelSnapshot,
        queue: Iterable[Waiting],
        budget: int,
        admit: Callable[[ModelSnapshot, Waiting, int], bool],
    ) -> tuple[Chunk, ...]:
        """Chunks for up to `budget` tokens. A new sequence takes part if there is a slot and `admit(model,
        waiting, need)`; the first that may not ends the list."""
        chunks: list[Chunk] = []
        for waiting in queue:
            left = waiting.tokens - waiting.computed
            size = min(left, budget)
            if size == 0 or (chunks and size < min(left, LEAST_CHUNK)):
                break
            if not waiting.open:
                need = self.need(model, waiting)
                if self.slots[model.model] == 0 or not admit(model, waiting, need):
                    break
                self.slots[model.model] -= 1
                self.available -= need
                self.held[model.model] += need
            chunks.append(Chunk(waiting.sequence, waiting.computed, waiting.computed + size))
            budget -= size
        return tuple(chunks)

    def prefill(self, model: ModelSnapshot, chunks: tuple[Chunk, ...]) -> None:
        """Start that job."""
        self.decisions.append(PrefillJob(model.model, chunks, self.options.prefill_share))
        self.prefilling = True
        self._started.update(chunk.sequence for chunk in chunks)

    # Decode

    def idle(self, model: ModelSnapshot, in_jobs: bool = False) -> list[Running]:
        """Sequences that a decode job may have, oldest first: those in none or in one that ends soon, or all
        with `in_jobs`."""
        gone = self._preempted
        return [
            r
            for r in self._running[model.model]
            if (in_jobs or r.renew or not r.in_job) and r.sequence not in gone
        ]

    def anybody_decodes(self) -> bool:
        """Whether some sequence that was in a decode job before is still to go on."""
        gone = self._preempted
        return any(r.decoded and r.sequence not in gone for m in self.models.values() for r in m.running)

    def growth(self, model: ModelSnapshot, running: Running, steps: int) -> int:
        """Blocks that `steps` more steps take beyond those held. The last token's KV is never written."""
        groups = _spans(model, min(running.length + steps - 1, running.limit - 1))
        return max(0, groups - running.groups) * model.blocks_per_span

    def decodable(self) -> list[str]:
        """Models that could start a decode job, by name; none if enough are started."""
        started = sum(job.kind == "decode" and not job.ends_soon for job in self.jobs)
        started += sum(isinstance(decision, DecodeJob) for decision in self.decisions)
        if started >= self.options.decode_jobs:
            return []
        return [name for name, m in self.models.items() if name not in self._decoding and self.idle(m)]

    def decode(self, model: ModelSnapshot, batch: Sequence[Running]) -> bool:
        """Start a decode job with those of `batch` (oldest first) that get blocks, with as many steps as fit.

        If not even one step of all fits, the newest sequences that should give way are preempted. Returns
        whether a job was started.
        """
        if not batch:
            return False
        steps = self._steps(model, batch)
        while steps > 1 and sum(self.growth(model, r, steps) for r in batch) > self.available:
            steps //= 2
        if any(r.renew for r in batch) and sum(self.growth(model, r, steps) for r in batch) > self.available:
            return False  # nobody gives way for a job that has time until the one before it ends
        taken = []
        for running in batch:
            need = self.growth(model, running, steps)
            if running.sequence in self._preempted or not self._make_room(model, running, need):
                continue
            self.available -= need
            self.held[model.model] += need
            taken.append(running.sequence)
        sequences = tuple(sequence for sequence in taken if sequence not in self._preempted)
        if not sequences:
            return False
        self.decisions.append(DecodeJob(model.model, sequences, steps, self.options.decode_share))
        self._decoding.add(model.model)
        self._started.update(sequences)
        return True

    def end_leases(self, joins: Callable[[ModelSnapshot, Running], bool]) -> None:
        """End leases that keep a sequence for which `joins` from its batch. Each does a step at least:
        models whose batches change all the time get on too."""
        for job in self.jobs:
            if job.kind != "decode" or job.ending or job.last_step or job.fresh:
                continue
            if job.model not in self.models:
                continue
            model = self.models[job.model]
            joiners = (
                r
                for r in self.idle(model)
                if not r.in_job
                and (r.sequence in self._started or self.growth(model, r, 1) <= self.available)
            )
            if any(joins(model, running) for running in joiners):
                self.decisions.append(EndLease(job.job))

    # Giving way

    def reclaim(self, model: ModelSnapshot, short: int) -> None:
        """Preempt the newest sequences of other models, while these are above quota, if that frees
        `short`."""
        held = dict(self.held)
        freed, victims = 0, []
        for holder in reversed(self.holders):
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

    def _steps(self, model: ModelSnapshot, batch: Sequence[Running]) -> int:
        """Models that decode in turns get shorter leases, so that none pauses for long."""
        active = sum(bool(m.running) for m in self.models.values())
        steps = max(min(2, self.options.lease_steps), self.options.lease_steps // max(1, active))
        return max(1, min(steps, max(r.limit - r.length for r in batch)))

    def _make_room(self, model: ModelSnapshot, running: Running, need: int) -> bool:
        """Preempt until `need` blocks are available. False: not yet, or `running` itself has given way."""
        while need > self.available:
            if need <= self.available + self.incoming:
                return False
            victim = self._victim(model, need)
            if victim is None:
                return False
            self._preempt(victim)
            if victim.sequence == running.sequence:
                return False
        return True

    def _victim(self, model: ModelSnapshot, need: int) -> Holder | None:
        """The newest sequence of the model most above its quota, `need` counted, else of the unit."""
        over = {
            name: self.held[name] + (need if name == model.model else 0) - quota
            for name, quota in self.quotas.items()
            if name in self.held
        }
        for name in sorted((n for n in over if over[n] > 0), key=lambda n: -over[n]):
            for holder in reversed(self.holders):
                if holder.model == name and self._may_yield(holder):
                    return holder
        return next((holder for holder in reversed(self.holders) if self._may_yield(holder)), None)

    def _may_yield(self, holder: Holder) -> bool:
        sequence = holder.sequence
        return sequence != self._senior and sequence not in self._preempted and sequence not in self._started

    def _preempt(self, holder: Holder) -> None:
        self.decisions.append(Preempt(holder.sequence))
        self._preempted.add(holder.sequence)
        self.held[holder.model] -= holder.blocks
        if holder.in_job:
            self.incoming += holder.blocks - holder.promised
            self.available += holder.promised
        else:
            self.available += holder.blocks


def rotated(names: Iterable[str], last: str) -> list[str]:
    """`names` in round-robin order: those after `last` first."""
    ordered = sorted(names)
    return [n for n in ordered if n > last] + [n for n in ordered if n <= last]


def _spans(model: ModelSnapshot, tokens: int) -> int:
    return -(-tokens // model.tokens_per_block)


def _holders(model: ModelSnapshot) -> Iterable[Holder]:
    for w in model.waiting:
        if w.open:
            promised = (_spans(model, w.tokens) - w.groups) * model.blocks_per_span
            blocks = w.groups * model.blocks_per_span + promised
            yield Holder(w.arrival, w.sequence, model.model, blocks, promised, w.in_job)
    for r in model.running:
        yield Holder(r.arrival, r.sequence, model.model, r.groups * model.blocks_per_span, 0, r.in_job)
