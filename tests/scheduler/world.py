"""A tiny unit for policies to drive: it keeps books as the scheduler does and runs jobs as a worker does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    AskAgain,
    Decision,
    DecodeJob,
    EndLease,
    JobEnded,
    ModelSnapshot,
    Policy,
    Pool,
    Preempt,
    PrefillJob,
    Refuse,
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
    ttft: float = 0.0
    tpot: float = 0.0


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
    jobs: list[int] = field(default_factory=list)
    """The job that runs, and the one that is to follow it."""
    preemptions: int = 0
    tenant: str = ""
    priority: int = 0
    deadline: float = math.inf
    first: float = 0.0
    """When its first token came."""
    end: float = 0.0
    """When it was finished."""

    @property
    def tokens(self) -> int:
        return self.prompt + self.emitted

    @property
    def limit(self) -> int:
        return self.prompt + self.output

    @property
    def done(self) -> bool:
        return self.emitted == self.output

    joining: bool = False
    """Whether it is in a decode job that has not computed its prompt yet."""

    @property
    def decodes(self) -> bool:
        return self.open and self.emitted > 0 and self.computed >= self.tokens - 1

    @property
    def running(self) -> bool:
        return self.joining or self.decodes


@dataclass
class Job:
    number: int
    what: PrefillJob | DecodeJob
    members: list[Request]
    steps: int = 0
    ending: bool = False
    nearing: bool = False
    """Whether it is known of a prefill job that it will soon have ended."""
    closing: dict[str, int] = field(default_factory=dict)
    closing_slots: dict[str, int] = field(default_factory=dict)
    sampled: int = 0
    """Tokens decoded."""
    whose: list[str] = field(default_factory=list)
    """Tenant of each chunk."""
    tenants: dict[str, int] = field(default_factory=dict)
    """Tokens decoded by tenant."""

    @property
    def context(self) -> int:
        return sum(r.tokens for r in self.members)

    @property
    def left(self) -> int:
        """Steps of a lease that are left."""
        return self.what.steps - self.steps if isinstance(self.what, DecodeJob) else 1

    @property
    def chunk_ends(self) -> dict[int, int]:
        """Of a prefill job, by sequence."""
        return {c.sequence: c.end for c in self.what.chunks} if isinstance(self.what, PrefillJob) else {}


class World:
    """Invariants are asserted wherever the books change."""

    def __init__(
        self,
        policy: Policy,
        total: int,
        shapes: dict[str, Shape],
        lead: int = 2,
        decode_lanes: int = 1,
        joins: bool = False,
    ) -> None:
        self.policy, self.total, self.shapes = policy, total, shapes
        self.decode_lanes = decode_lanes
        self.joins = joins
        self.lead = lead
        """Steps before a lease's end when the next one may be decided on."""
        self.requests: dict[int, Request] = {}
        self.finished: list[Request] = []
        self.quotas: dict[str, int] = {}
        self.jobs: dict[int, Job] = {}
        self.last_job = 0
        self.now = 0.0
        self.ask_at = math.inf
        """When the policy wants to be asked again."""
        self.refused: list[Request] = []
        self.log: list[Decision] = []

    def add(self, model: str, prompt: int, output: int, **more: Any) -> Request:
        number = len(self.requests) + len(self.finished) + len(self.refused) + 1
        request = Request(number, model, prompt, output, self.now, **more)
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
                    waiting=tuple(self.waiting(r) for r in mine if not r.running),
                    running=tuple(self.running(r) for r in mine if r.running),
                    held=sum(map(self.blocks, mine)),
                    closing=sum(job.closing.get(name, 0) for job in self.jobs.values()),
                    pinned_quota=shape.pinned,
                    rate=shape.rate,
                    ttft_target=shape.ttft,
                    tpot_target=shape.tpot,
                )
            )
        jobs = tuple(
            RunningJob(
                job.number,
                "prefill" if isinstance(job.what, PrefillJob) else "decode",
                job.what.model,
                job.ending,
                ends_soon=self.ends_soon(job),
                last_step=job.left <= 1,
                fresh=isinstance(job.what, DecodeJob) and job.steps == 0 and not self.follows(job),
            )
            for job in self.jobs.values()
        )
        return Snapshot(tuple(models), Pool(self.total, self.available), jobs, self.decode_lanes, self.joins)

    def ends_soon(self, job: Job) -> bool:
        """Whether it is near its end and none follows."""
        if isinstance(job.what, PrefillJob):
            return job.nearing and len(self.prefills) == 1
        if not job.ending and job.left > self.lead:
            return False
        same = (
            o for o in self.jobs.values() if isinstance(o.what, DecodeJob) and o.what.model == job.what.model
        )
        return sum(1 for _ in same) == 1

    @property
    def prefills(self) -> list[Job]:
        """The prefill job that runs, and the one that is to follow it."""
        return [job for job in self.jobs.values() if isinstance(job.what, PrefillJob)]

    def follows(self, job: Job) -> bool:
        """Whether it waits for another one to end: of its kind, and if they decode, its model."""
        if isinstance(job.what, PrefillJob):
            return job is not self.prefills[0]
        return any(
            other.number < job.number
            and isinstance(other.what, DecodeJob)
            and other.what.model == job.what.model
            for other in self.jobs.values()
        )

    def waiting(self, r: Request) -> Waiting:
        soon = bool(r.jobs) and self.ends_soon(self.jobs[r.jobs[0]])
        return Waiting(
            r.number,
            r.arrival,
            r.tokens,
            self.jobs[r.jobs[0]].chunk_ends[r.number] if soon else r.computed,
            r.groups,
            r.open,
            bool(r.jobs),
            r.priority,
            r.limit,
            r.tenant,
            r.deadline,
            r.emitted > 0,
        )

    def running(self, r: Request) -> Running:
        length, renew = r.tokens, False
        job = self.jobs[r.jobs[0]] if r.jobs else None
        if job is not None and isinstance(job.what, DecodeJob) and self.ends_soon(job) and r.decodes:
            after = r.tokens + job.left
            if job.ending:
                after = min(after, max(length + 1, r.limit - 1))
            if after < r.limit:
                length, renew = after, True
        return Running(
            r.number,
            r.arrival,
            length,
            r.limit,
            r.groups,
            bool(r.jobs),
            r.decoded,
            renew,
            r.priority,
            r.tenant,
            r.prompt,
        )

    # What it decides

    def decide(self) -> list[Decision]:
        self.ask_at = math.inf
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
            case AskAgain(at):
                assert at > self.now
                self.ask_at = at
            case Refuse(number):
                request = self.requests.pop(number)
                assert not request.open and not request.emitted, "what was begun is not refused"
                self.refused.append(request)
            case PrefillJob(model, chunks, _, borrow):
                assert all(map(self.ends_soon, self.prefills)), "one prefill, and one that is to follow it"
                members = [self.requests[chunk.sequence] for chunk in chunks]
                for chunk, request in zip(chunks, members, strict=True):
                    assert request.model == model and not request.running
                    computed = max(
                        [request.computed, *(self.jobs[j].chunk_ends[request.number] for j in request.jobs)]
                    )
                    assert computed == chunk.start < chunk.end <= request.tokens
                    request.open = True
                    self.grow(request, chunk.end)
                self.check_quota(model, borrow)
                self.start(decision, members)
            case DecodeJob(model, sequences, steps, _, borrow, _, prompts):
                assert steps >= 1 and sequences
                assert self.joins or not prompts
                assert all(
                    self.ends_soon(job)
                    for job in self.jobs.values()
                    if isinstance(job.what, DecodeJob) and job.what.model == model
                ), "one lease of a model, and one that is to follow it"
                members = [self.requests[number] for number in sequences]
                for request in members:
                    assert request.model == model and request.decodes
                    assert all(isinstance(self.jobs[number].what, DecodeJob) for number in request.jobs)
                    assert len(request.jobs) <= 1
                    request.decoded = True
                    length = request.tokens + sum(self.jobs[number].left for number in request.jobs)
                    self.grow(request, min(length + steps - 1, request.limit - 1))
                for chunk in prompts:
                    request = self.requests[chunk.sequence]
                    assert request.model == model and not request.running and not request.jobs
                    assert request.computed == chunk.start < chunk.end == request.tokens
                    request.open = request.decoded = request.joining = True
                    self.grow(request, min(request.tokens + steps - 1, request.limit - 1))
                    members.append(request)
                self.check_quota(model, borrow)
                self.start(decision, members)

    def check_quota(self, model: str, borrow: bool) -> None:
        held = sum(self.blocks(r) for r in self.requests.values() if r.model == model)
        held += sum(job.closing.get(model, 0) for job in self.jobs.values())
        assert borrow or held <= self.quotas[model], "a job that may not borrow keeps the quota"

    def grow(self, request: Request, tokens: int) -> None:
        groups = -(-tokens // self.shapes[request.model].tokens_per_block)
        request.groups = max(request.groups, groups)

    def start(self, what: PrefillJob | DecodeJob, members: list[Request]) -> None:
        assert 0 < what.share <= 1
        self.last_job += 1
        whose = [request.tenant for request in members]
        self.jobs[self.last_job] = Job(self.last_job, what, members, whose=whose)
        for request in members:
            request.jobs.append(self.last_job)

    def close(self, request: Request) -> None:
        """Give back slot and blocks; those of a sequence in a job when that ends."""
        for number in request.jobs:
            self.jobs[number].members.remove(request)
            self.end_lease(self.jobs[number])
        if request.jobs:
            last = self.jobs[request.jobs[-1]]
            last.closing[request.model] = last.closing.get(request.model, 0) + self.blocks(request)
            last.closing_slots[request.model] = last.closing_slots.get(request.model, 0) + 1
        request.jobs.clear()
        request.open = request.decoded = request.joining = False
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
        """End a prefill job, or run one step of a decode job (or end it, where its lease was ended). One that
        is to follow another one does not run yet; if its lease was ended, it is over."""
        if isinstance(job.what, PrefillJob):
            if self.follows(job):
                return
            ends = job.chunk_ends
            for request in list(job.members):
                request.computed = ends[request.number]
                if request.computed == request.tokens:
                    self.emit(request, job)
            self.end(job)
            self.report(job)
            return
        if self.follows(job) and not job.ending:
            return
        if not job.ending:
            job.steps += 1
            for request in list(job.members):
                request.computed, request.joining = request.tokens, False
                self.emit(request, job)
        if job.ending or job.steps == job.what.steps or not job.members:
            self.end(job)

    def report(self, job: Job) -> None:
        """Tell the policy of a prefill job."""
        assert isinstance(job.what, PrefillJob)
        tokens = sum(chunk.end - chunk.start for chunk in job.what.chunks)
        self.policy.observe(JobEnded("prefill", job.what.model, tokens, tokens / 1000))

    def emit(self, request: Request, job: Job) -> None:
        request.emitted += 1
        assert request.computed <= request.groups * self.shapes[request.model].tokens_per_block
        if request.done:
            del self.requests[request.number]
            self.finished.append(request)
            for number in request.jobs:
                self.jobs[number].members.remove(request)

    def end(self, job: Job) -> None:
        del self.jobs[job.number]
        for request in job.members:
            request.joining = False
            request.jobs.remove(job.number)
            if job.ending and request.jobs:  # what follows begins where this one was left
                following = self.jobs[request.jobs[0]]
                request.groups = 0
                self.grow(request, min(request.tokens + job.left - 1, request.limit - 1))
                self.grow(request, min(request.tokens + following.left - 1, request.limit - 1))
