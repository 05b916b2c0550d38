"""`Unit`: a simulated unit. It keeps the books that a scheduler keeps, and drives one of its policies.

The policy sees what it sees in the service, but for one thing: leases are not renewed before they end, since
an order takes no time here. Tokens of a decode job are counted when it ends; a request that finishes earlier
is told of at the time of its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import BLOCK_BYTES
from muxserve.placement.solver.workload import Model
from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    AskAgain,
    Decision,
    DecodeJob,
    EndLease,
    Finished,
    JobEnded,
    ModelSnapshot,
    Policy,
    Pool,
    Preempt,
    PrefillJob,
    Refuse,
    RunningJob,
    Snapshot,
    Waiting,
)
from muxserve.sim.executor import Executor, Work
from muxserve.sim.requests import Request


@dataclass(slots=True, eq=False)
class Job:
    """A job that was started and has not ended."""

    work: Work
    members: dict[int, Request]
    ends: dict[int, int]
    """Prefill: where each sequence's chunk ends."""
    tokens: int
    """Prefill: prompt tokens."""
    context: int
    joined: Sequence[Request] = ()
    """Decode: members whose prompts the first step computes."""
    prompts: int = 0
    """Tokens that it computes of them."""
    closing: dict[str, int] = field(default_factory=dict)
    """Blocks by model, of sequences that were closed meanwhile."""
    closing_slots: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Books:
    """A model of the unit, and its sequences."""

    model: Model
    tokens_per_block: int
    blocks_per_span: int
    slots: int
    rate: float
    waiting: dict[int, Request] = field(default_factory=dict)
    running: dict[int, Request] = field(default_factory=dict)
    held: int = 0
    closing: int = 0
    open: int = 0
    """Slots in use, those of closing sequences included."""
    seen: ModelSnapshot | None = None
    """The last snapshot, while nothing has changed."""

    def groups(self, tokens: int) -> int:
        """Block groups of so many tokens."""
        return -(-tokens // self.tokens_per_block)


class Unit:
    """One policy object and one executor."""

    def __init__(
        self,
        policy: Policy,
        models: Sequence[tuple[Model, float]],
        costs: CostModel,
        degree: int,
        kv_bytes: int,
        slots: int,
        ahead: int,
        finished: Callable[[Request], None],
        compute_units: int = 0,
        decode_lanes: int = 1,
        order_seconds: float = 0.0,
        lease_seconds: float = 0.0,
    ) -> None:
        """`models` with the rates that are expected here. `ahead`: most requests of a model that wait here
        and not in its queue. `finished` is told of requests that are over."""
        self.policy = policy
        self.executor = Executor(costs, degree, compute_units, decode_lanes, order_seconds, lease_seconds)
        self.total = kv_bytes // BLOCK_BYTES
        self.available = self.total
        self.models = {model.name: _books(model, rate, slots) for model, rate in sorted(models, key=_name)}
        self.jobs: dict[int, Job] = {}
        self.ask_at = float("inf")
        """When the policy wants to be asked, whatever happens."""
        self.tokens = 0
        """Tokens sampled."""
        self.decisions = 0
        self.preemptions = 0
        self._ahead = ahead
        self._finished = finished
        self._by_number: dict[int, Request] = {}
        self._quotas: dict[str, int] = {}
        self._last = 0

    @property
    def prefilling(self) -> bool:
        """Whether a prefill job was started and has not ended: no policy starts another one beside it."""
        return bool(self.executor.lanes["prefill"])

    def room(self, model: str) -> int:
        """Requests of `model` to pull from its queue now, as in the scheduler."""
        books = self.models[model]
        return self._ahead - (len(books.waiting) + len(books.running) - books.open)

    def deliver(self, request: Request) -> None:
        """A request from the queue."""
        books = self.models[request.model]
        request.waiting = Waiting(request.number, request.arrival, request.prompt, limit=request.limit)
        books.waiting[request.number] = self._by_number[request.number] = request
        books.seen = None

    def next_event(self) -> float:
        """When something happens next by itself."""
        return min(self.executor.next_end(), self.ask_at)

    def advance(self, now: float) -> bool:
        """Let time pass until `now`, which is no later than `next_event()`; whether there is something to
        decide."""
        ended = self.executor.advance(now)
        for work in ended:
            self._end(self.jobs.pop(work.number), now)
        if now >= self.ask_at:
            self.ask_at = float("inf")
            return True
        return bool(ended)

    def decide(self) -> None:
        """Ask the policy, and carry out what it says."""
        now = self.executor.now
        self.decisions += 1
        self.ask_at = float("inf")
        for decision in self.policy.decide(self._snapshot(), now):
            self._carry_out(decision, now)

    def check(self) -> None:
        """AssertionError: the books do not agree with each other."""
        held = sum(b.held + b.closing for b in self.models.values())
        assert held + self.available == self.total, "free + held + closing = total"
        assert self.available >= 0, "no more blocks are held than there are"
        for books in self.models.values():
            mine = [*books.waiting.values(), *books.running.values()]
            assert books.held == sum(r.groups for r in mine) * books.blocks_per_span
            assert sum(r.open for r in mine) <= books.open <= books.slots

    # What the policy sees

    def _snapshot(self) -> Snapshot:
        models = tuple(books.seen or self._look(name, books) for name, books in self.models.items())
        jobs = tuple(self._job(job.work) for job in self.jobs.values())
        pool, lanes = Pool(self.total, self.available), self.executor.decode_lanes
        # Engines on cores compute prompts in a step; those on GPUs do not.
        return Snapshot(models, pool, jobs, lanes, self.executor.units > 0)

    def _look(self, name: str, books: Books) -> ModelSnapshot:
        books.seen = ModelSnapshot(
            model=name,
            tokens_per_block=books.tokens_per_block,
            blocks_per_span=books.blocks_per_span,
            slots_free=books.slots - books.open,
            quota=self._quotas.get(name),
            waiting=tuple(r.waiting for r in books.waiting.values()),
            running=tuple(r.running for r in books.running.values()),
            held=books.held,
            closing=books.closing,
            rate=books.rate,
        )
        return books.seen

    def _job(self, work: Work) -> RunningJob:
        return RunningJob(
            work.number,
            work.kind,
            work.name,
            work.ending,
            last_step=work.steps - work.done <= 1,
            fresh=work.kind == "decode" and work.done < 1,
        )

    # What it decides

    def _carry_out(self, decision: Decision, now: float) -> None:
        match decision:
            case PrefillJob():
                self._prefill(decision)
            case DecodeJob():
                self._decode(decision)
            case Preempt(number):
                self.preemptions += 1
                self._close(self._by_number[number])
            case EndLease(number):
                self.executor.end_lease(self.jobs[number].work)
            case AdaptQuotas(quotas):
                self._quotas = dict(quotas)
                for books in self.models.values():
                    books.seen = None
            case Refuse(number):
                request = self._by_number.pop(number)
                books = self.models[request.model]
                del books.waiting[number]
                books.seen = None
                request.refused = True
                self._finished(request)
            case AskAgain(at):
                self.ask_at = max(at, now + 1e-6)

    def _prefill(self, order: PrefillJob) -> None:
        books = self.models[order.model]
        members = {chunk.sequence: books.waiting[chunk.sequence] for chunk in order.chunks}
        for chunk in order.chunks:
            request = members[chunk.sequence]
            self._open(books, request)
            request.waiting.in_job = True
            self._grow(books, request, chunk.end)
            request.waiting.groups = request.groups
        tokens = sum(chunk.end - chunk.start for chunk in order.chunks)
        work = self._work("prefill", books, len(members), tokens / len(members), order.share)
        self._start(
            Job(
                work,
                members,
                {chunk.sequence: chunk.end for chunk in order.chunks},
                tokens,
                sum(chunk.start for chunk in order.chunks),
            ),
            books,
        )

    def _decode(self, order: DecodeJob) -> None:
        books = self.models[order.model]
        members = {number: books.running[number] for number in order.sequences}
        joined = [self._join(books, chunk.sequence) for chunk in order.prompts]
        for request in joined:
            members[request.number] = request
        prompts = sum(chunk.end - chunk.start for chunk in order.prompts)
        context = 0
        for request in members.values():
            context += request.known
            self._grow(books, request, min(request.known + order.steps - 1, request.limit - 1))
            running = request.running
            running.groups, running.in_job, running.decoded = request.groups, True, True
        length = context / len(members) + order.steps / 2
        work = self._work("decode", books, len(members), length, order.share)
        work.steps, work.exclusive, work.prompt = order.steps, order.exclusive, prompts
        self._start(Job(work, members, {}, 0, context - prompts, joined, prompts), books)

    def _join(self, books: Books, number: int) -> Request:
        """A request whose prompt a decode job computes: it runs from now on."""
        request = books.waiting.pop(number)
        self._open(books, request)
        request.begin_running()
        books.running[number] = request
        return request

    def _work(self, kind: str, books: Books, batch: int, length: float, share: float) -> Work:
        self._last += 1
        model = books.model
        return Work(
            self._last,
            "prefill" if kind == "prefill" else "decode",
            model.name,
            model.model,
            model.shape,
            batch,
            length,
            share,
        )

    def _start(self, job: Job, books: Books) -> None:
        for request in job.members.values():
            request.job = job
        self.jobs[job.work.number] = job
        self.executor.start(job.work)
        books.seen = None

    def _open(self, books: Books, request: Request) -> None:
        if not request.open:
            request.open = request.waiting.open = True
            books.open += 1

    def _grow(self, books: Books, request: Request, tokens: int) -> None:
        more = books.groups(tokens) - request.groups
        if more > 0:
            request.groups += more
            books.held += more * books.blocks_per_span
            self.available -= more * books.blocks_per_span

    def _close(self, request: Request) -> None:
        """Take slot and blocks away: at once, or when the job ends that it is in."""
        books = self.models[request.model]
        blocks = request.groups * books.blocks_per_span
        books.held -= blocks
        job = request.job
        if isinstance(job, Job):
            del job.members[request.number]
            job.closing[request.model] = job.closing.get(request.model, 0) + blocks
            job.closing_slots[request.model] = job.closing_slots.get(request.model, 0) + 1
            books.closing += blocks
            if job.work.kind == "decode":
                self.executor.end_lease(job.work)
        else:
            self.available += blocks
            books.open -= 1
        books.running.pop(request.number, None)
        request.recompute()
        books.waiting[request.number] = request
        books.seen = None

    # What comes of it

    def _end(self, job: Job, now: float) -> None:
        books = self.models[job.work.name]
        books.seen = None
        tokens = self._computed(job, books, now) if job.ends else self._decoded(job, books, now)
        for name, blocks in job.closing.items():
            self.models[name].closing -= blocks
            self.models[name].open -= job.closing_slots[name]
            self.models[name].seen = None
            self.available += blocks
        work = job.work
        if work.busy <= 0:
            return
        self.policy.observe(
            JobEnded(
                work.kind,
                work.name,
                tokens,
                work.busy,
                steps=max(1, round(work.done)),
                context=job.context,
                beside=work.beside / work.busy,
                tenants={"": tokens},
                together=work.together / work.busy,
                prompts={"": job.prompts} if job.prompts else {},
            )
        )

    def _computed(self, job: Job, books: Books, now: float) -> int:
        """Chunks are computed; prompts that are complete have their next token."""
        for number, request in job.members.items():
            request.job = None
            request.waiting.computed, request.waiting.in_job = job.ends[number], False
            if job.ends[number] < request.known:
                continue
            del books.waiting[number]
            self._emit(request, 1, now)
            if request.emitted == request.output:
                self._finish(books, request, now)
                continue
            request.begin_running()
            books.running[number] = request
        return job.tokens

    def _decoded(self, job: Job, books: Books, now: float) -> int:
        """Every member has one token per step, until it has all."""
        work, total = job.work, 0
        steps = round(work.done)
        begun, before = work.began, 0
        if job.joined:
            self._prompts_ended(job, books)
            begun, before = work.first, 1
        for request in list(job.members.values()):
            request.job = None
            request.running.in_job = False
            count = min(steps, request.output - request.emitted)
            if count == 0:
                continue
            total += count
            at = now if count == steps else begun + (now - begun) * (count - before) / (steps - before)
            self._emit(request, count, at)
            if request.emitted == request.output:
                del books.running[request.number]
                self._finish(books, request, at)
            else:
                request.running.length = request.known
        return total

    def _prompts_ended(self, job: Job, books: Books) -> None:
        """Those whose prompts a decode job was to compute have a token since the end of its first step; if no
        step ran, they wait as they did before."""
        for request in job.joined:
            if request.number not in job.members:
                continue
            if job.work.first < 0:
                del job.members[request.number], books.running[request.number]
                books.waiting[request.number] = request
                request.job, request.waiting.groups = None, request.groups
            elif request.first < 0:
                request.first = job.work.first

    def _emit(self, request: Request, count: int, at: float) -> None:
        if request.first < 0:
            request.first = at
        request.emitted += count
        self.tokens += count

    def _finish(self, books: Books, request: Request, at: float) -> None:
        blocks = request.groups * books.blocks_per_span
        books.held -= blocks
        books.open -= 1
        self.available += blocks
        request.finish = at
        seconds = at - request.arrival
        self.policy.observe(Finished(request.number, request.model, request.output, request.output, seconds))
        del self._by_number[request.number]
        self._finished(request)


def _books(model: Model, rate: float, slots: int) -> Books:
    shape = model.shape
    span = max(1, BLOCK_BYTES // (2 * shape.head_dim * 2))
    return Books(model, span, shape.layers * shape.kv_heads, slots, rate)


def _name(entry: tuple[Model, float]) -> str:
    return entry[0].name
