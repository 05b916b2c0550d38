"""A tiny unit for policies to drive: it keeps books as the scheduler does and runs jobs as a worker does."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    Decision,
    DecodeJob,
    EndLease,
    JobEnded,
    ModelSnapshot,
    Policy,
    Pool,
    Preempt,
    PrefillJob,
    Running,
    RunningJob,
    Snapshot,
    Waiting,
)


@dataclass
class Shape:
    tokens_per_block: int
    blocks_per_span: int
    slots: int
    rate: float = 0.0
    pinned: int = 0


@dataclass
class Request:
    number: int
    model: str
    prompt: int
    output: int
    arrival: float
    emitted: int = 0
    computed: int = 0
    groups: int = 0
    open: bool = False
    decoded: bool = False
    job: int | None = None
    preemptions: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.emitted

    @property
    def limit(self) -> int:
        return self.prompt + self.output

    @property
    def done(self) -> bool:
        return self.emitted == self.output

    @property
    def running(self) -> bool:
        return self.open and self.emitted > 0 and self.computed >= self.tokens - 1


@dataclass
class Job:
    number: int
    what: PrefillJob | DecodeJob
    members: list[Request]
    steps: int = 0
    ending: bool = False
    closing: dict[str, int] = field(default_factory=dict)
    closing_slots: dict[str, int] = field(default_factory=dict)


class World:
    """Invariants are asserted wherever the books change."""

    def __init__(self, policy: Policy, total: int, shapes: dict[str, Shape]) -> None:
        self.policy, self.total, self.shapes = policy, total, shapes
        self.requests: dict[int, Request] = {}
        self.finished: list[Request] = []
        self.quotas: dict[str, int] = {}
        self.jobs: dict[int, Job] = {}
        self.last_job = 0
        self.now = 0.0
        self.log: list[Decision] = []

    def add(self, model: str, prompt: int, output: int) -> Request:
        number = len(self.requests) + len(self.finished) + 1
        request = Request(number, model, prompt, output, self.now)
        self.requests[number] = request
        return request

    # What the policy sees

    def blocks(self, request: Request) -> int:
        return request.groups * self.shapes[request.model].blocks_per_span

    @property
    def available(self) -> int:
        closing = sum(sum(job.closing.values()) for job in self.jobs.values())
        return self.total - closing - sum(map(self.blocks, self.requests.values()))

    def snapshot(self) -> Snapshot:
        models = []
        for name, shape in sorted(self.shapes.items()):
            mine = [r for r in self.requests.values() if r.model == name]
            closing_slots = sum(job.closing_slots.get(name, 0) for job in self.jobs.values())
            models.append(
                ModelSnapshot(
                    model=name,
                    tokens_per_block=shape.tokens_per_block,
                    blocks_per_span=shape.blocks_per_span,
                    slots_free=shape.slots - sum(r.open for r in mine) - closing_slots,
                    quota=self.quotas.get(name),
                    waiting=tuple(
                        Waiting(
                            r.number, r.arrival, r.tokens, r.computed, r.groups, r.open, r.job is not None
                        )
                        for r in mine
                        if not r.running
                    ),
                    running=tuple(
                        Running(
                            r.number, r.arrival, r.tokens, r.limit, r.groups, r.job is not None, r.decoded
                        )
                        for r in mine
                        if r.running
                    ),
                    held=sum(map(self.blocks, mine)),
                    closing=sum(job.closing.get(name, 0) for job in self.jobs.values()),
                    pinned_quota=shape.pinned,
                    rate=shape.rate,
                )
            )
        jobs = tuple(
            RunningJob(
                job.number,
                "prefill" if isinstance(job.what, PrefillJob) else "decode",
                job.what.model,
                job.what.share,
                job.ending,
            )
            for job in self.jobs.values()
        )
        return Snapshot(tuple(models), Pool(self.total, self.available), jobs, cores=2)

    # What it decides

    def decide(self) -> list[Decision]:
        decisions = list(self.policy.decide(self.snapshot(), self.now))
        self.log += decisions
        for decision in decisions:
            self.carry_out(decision)
            self.check()
        return decisions

    def carry_out(self, decision: Decision) -> None:
        match decision:
            case AdaptQuotas(quotas):
                self.quotas = dict(quotas)
            case Preempt(number):
                self.requests[number].preemptions += 1
                self.close(self.requests[number])
            case EndLease(job):
                self.end_lease(self.jobs[job])
            case PrefillJob(model, chunks):
                assert all(isinstance(job.what, DecodeJob) for job in self.jobs.values()), (
                    "one prefill at a time"
                )
                members = [self.requests[chunk.sequence] for chunk in chunks]
                for chunk, request in zip(chunks, members, strict=True):
                    assert request.model == model and not request.running
                    assert request.computed == chunk.start < chunk.end <= request.tokens
                    request.open = True
                    self.grow(request, chunk.end)
                self.start(decision, members)
            case DecodeJob(model, sequences, steps):
                assert steps >= 1 and sequences
                assert not any(
                    isinstance(job.what, DecodeJob) and job.what.model == model for job in self.jobs.values()
                )
                members = [self.requests[number] for number in sequences]
                for request in members:
                    assert request.model == model and request.running
                    request.decoded = True
                    self.grow(request, min(request.tokens + steps - 1, request.limit - 1))
                self.start(decision, members)

    def grow(self, request: Request, tokens: int) -> None:
        assert request.job is None
        groups = -(-tokens // self.shapes[request.model].tokens_per_block)
        request.groups = max(request.groups, groups)

    def start(self, what: PrefillJob | DecodeJob, members: list[Request]) -> None:
        assert 0 < what.share <= 1
        self.last_job += 1
        self.jobs[self.last_job] = Job(self.last_job, what, members)
        for request in members:
            request.job = self.last_job

    def close(self, request: Request) -> None:
        """Give back slot and blocks; those of a sequence in a job when that ends."""
        if request.job is not None:
            job = self.jobs[request.job]
            job.closing[request.model] = job.closing.get(request.model, 0) + self.blocks(request)
            job.closing_slots[request.model] = job.closing_slots.get(request.model, 0) + 1
            job.members.remove(request)
            self.end_lease(job)
        request.job, request.open, request.decoded = None, False, False
        request.groups = request.computed = 0

    def end_lease(self, job: Job) -> None:
        if isinstance(job.what, DecodeJob):
            job.ending = True

    def check(self) -> None:
        assert self.available >= 0, "blocks held never exceed the pool"
        for name, shape in self.shapes.items():
            closing = sum(job.closing_slots.get(name, 0) for job in self.jobs.values())
            assert closing + sum(r.open for r in self.requests.values() if r.model == name) <= shape.slots

    # What the worker does

    def advance(self, job: Job) -> None:
        """End a prefill job, or run one step of a decode job (or end it, where its lease was ended)."""
        if isinstance(job.what, PrefillJob):
            ends = {chunk.sequence: chunk.end for chunk in job.what.chunks}
            for request in list(job.members):
                request.computed = ends[request.number]
                if request.computed == request.tokens:
                    self.emit(request, job)
            self.end(job)
            tokens = sum(chunk.end - chunk.start for chunk in job.what.chunks)
            self.policy.observe(JobEnded("prefill", job.what.model, tokens, tokens / 1000))
            return
        if not job.ending:
            job.steps += 1
            for request in list(job.members):
                request.computed = request.tokens
                self.emit(request, job)
        if job.ending or job.steps == job.what.steps or not job.members:
            self.end(job)

    def emit(self, request: Request, job: Job) -> None:
        request.emitted += 1
        assert request.computed <= request.groups * self.shapes[request.model].tokens_per_block
        if request.done:
            del self.requests[request.number]
            self.finished.append(request)
            job.members.remove(request)

    def end(self, job: Job) -> None:
        del self.jobs[job.number]
        for request in job.members:
            request.job = None
