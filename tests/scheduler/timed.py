"""A `World` whose jobs take time: a device with two lanes, one for each kind of job, that share its cores."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from muxserve.scheduler.policy.interface import DecodeJob, Finished, JobEnded, Policy, PrefillJob
from tests.scheduler.world import Job, Request, Shape, World

Kind = Literal["prefill", "decode"]

STEPS = ((1, 0.008), (8, 0.011), (32, 0.029), (64, 0.058))
"""A decode step of SmolLM2-135M in bfloat16 on two cores: (sequences, seconds)."""
PREFILL = 0.00062
"""Seconds per token of a prompt."""
JOB = 0.002
"""Seconds between two prefill jobs."""
BESIDE = 1.9
"""By how much jobs of both kinds that run at once take longer."""
TRIP = 0.003
"""Seconds from a message to what the scheduler makes of it."""


def step_seconds(sequences: int) -> float:
    """Of a decode step, between and beyond what was measured."""
    for (n, t), (m, u) in pairwise(STEPS):
        if sequences <= m:
            return t + (u - t) * (sequences - n) / (m - n)
    return sequences * STEPS[-1][1] / STEPS[-1][0]


def alone_seconds(request: Request | Arrival) -> float:
    """Of a request that has the device for itself."""
    return JOB + request.prompt * PREFILL + (request.output - 1) * step_seconds(1) + TRIP


@dataclass
class Arrival:
    at: float
    model: str
    prompt: int
    output: int
    tenant: str = ""
    deadline: float = math.inf
    """Seconds from its arrival."""


@dataclass
class Lane:
    """Jobs of one kind, one at a time."""

    queue: list[int] = field(default_factory=list)
    left: float = 0.0
    """Seconds of the step or job that runs, with the device for itself."""
    busy: float = 0.0
    shared: float = 0.0
    """Seconds of the job that runs so far, and of those beside another."""

    @property
    def job(self) -> int | None:
        return self.queue[0] if self.queue else None


class TimedWorld(World):
    """Plays arrivals in simulated time. The policy is asked a trip after something has happened."""

    def __init__(self, policy: Policy, total: int, shapes: dict[str, Shape], joins: bool = False) -> None:
        super().__init__(policy, total, shapes, lead=4, joins=joins)
        self.lanes: dict[Kind, Lane] = {"prefill": Lane(), "decode": Lane()}
        self.due: list[float] = []
        self.busy = 0.0

    def play(self, arrivals: Iterable[Arrival], until: float = math.inf) -> None:
        """Until all is done, or it is so late."""
        coming = sorted(arrivals, key=lambda a: a.at, reverse=True)
        while coming or self.requests:
            next_step, lane = self._next_step()
            times = (coming[-1].at if coming else math.inf, self.due[0] if self.due else math.inf)
            at = min(next_step, self.ask_at, *times)
            if at > until:
                return
            assert at < math.inf, "nothing will ever happen"
            self._pass(at - self.now)
            self.now = at
            if at == times[0]:
                a = coming.pop()
                self.add(a.model, a.prompt, a.output, tenant=a.tenant, deadline=a.at + a.deadline)
                self.ask(0.0)
            elif at == times[1]:
                while self.due and self.due[0] <= at:
                    heapq.heappop(self.due)
                self.decide_now()
            elif at == self.ask_at:
                self.decide_now()
            elif lane is not None:
                self._step(lane)

    def ask(self, after: float = TRIP) -> None:
        heapq.heappush(self.due, self.now + after)

    def decide_now(self) -> None:
        self.decide()
        for job in self.jobs.values():
            lane = self.lanes["prefill" if isinstance(job.what, PrefillJob) else "decode"]
            if job.number not in lane.queue:
                lane.queue.append(job.number)
                if len(lane.queue) == 1:
                    self._begin(lane)
                if isinstance(job.what, DecodeJob) and job.what.steps <= self.lead:
                    self.ask()

    # The device

    def _speed(self) -> float:
        return 1 / BESIDE if all(lane.queue for lane in self.lanes.values()) else 1.0

    def _next_step(self) -> tuple[float, Lane | None]:
        speed = self._speed()
        ends = [(self.now + lane.left / speed, lane) for lane in self.lanes.values() if lane.queue]
        return min(ends, key=lambda each: each[0], default=(math.inf, None))

    def _pass(self, seconds: float) -> None:
        speed = self._speed()
        for lane in self.lanes.values():
            if lane.queue:
                lane.left = max(0.0, lane.left - seconds * speed)
                lane.busy += seconds
                lane.shared += seconds if speed < 1 else 0.0
        if any(lane.queue for lane in self.lanes.values()):
            self.busy += seconds

    def _begin(self, lane: Lane) -> None:
        job = self.jobs[lane.queue[0]]
        lane.busy = lane.shared = 0.0
        lane.left = self._seconds(job)

    def _seconds(self, job: Job) -> float:
        if isinstance(job.what, PrefillJob):
            return JOB + PREFILL * sum(chunk.end - chunk.start for chunk in job.what.chunks)
        prompts = sum(request.tokens - request.computed for request in job.members if request.joining)
        return step_seconds(len(job.members)) + PREFILL * prompts if job.members else 0.0

    def _step(self, lane: Lane) -> None:
        """A step or a prefill job has ended."""
        job = self.jobs[lane.queue[0]]
        done, tokens, was_soon = len(self.finished), len(job.members), self.ends_soon(job)
        job.sampled += 0 if isinstance(job.what, PrefillJob) else tokens
        for request in job.members:
            job.tenants[request.tenant] = job.tenants.get(request.tenant, 0) + 1
        if not (job.ending and not job.members):
            self.advance(job)
        elif job.number in self.jobs:
            self.end(job)
        if job.number in self.jobs:
            lane.left = self._seconds(job)
            if len(self.finished) > done or (self.ends_soon(job) and not was_soon):
                self.ask()
            return
        self._report(job, lane)
        for other in self.lanes.values():
            other.queue = [number for number in other.queue if number in self.jobs]
        if lane.queue:
            self._begin(lane)
        self.ask()

    def _report(self, job: Job, lane: Lane) -> None:
        beside = lane.shared / lane.busy if lane.busy else 0.0
        if isinstance(job.what, PrefillJob):
            tenants: dict[str, int] = {}
            for chunk, tenant in zip(job.what.chunks, job.whose, strict=True):
                tenants[tenant] = tenants.get(tenant, 0) + chunk.end - chunk.start
            tokens = sum(tenants.values())
            context = sum(chunk.start for chunk in job.what.chunks)
            event = JobEnded("prefill", job.what.model, tokens, lane.busy, 1, context, beside, tenants)
        else:
            if not job.steps:
                return
            context = job.context
            prompts = {"": sum(c.end - c.start for c in job.what.prompts)} if job.what.prompts else {}
            event = JobEnded(
                *("decode", job.what.model, job.sampled, lane.busy, job.steps, context, beside, job.tenants),
                prompts=prompts,
            )
        self.policy.observe(event)

    def emit(self, request: Request, job: Job) -> None:
        super().emit(request, job)
        request.first = request.first or self.now
        if request.done:
            request.end = self.now
            seconds = self.now - request.arrival
            output = request.output
            self.policy.observe(Finished(request.number, request.model, output, output, seconds))


def skewed(
    seed: int,
    seconds: float,
    rate: float,
    alpha: float,
    models: int = 4,
    lengths: tuple[float, float] = (80, 60),
    make: Callable[[float, str, int, int], Arrival] = Arrival,
) -> list[Arrival]:
    """Poisson arrivals, popularity (i + 1)^-alpha, log-normal lengths with these means."""
    order = random.Random(seed)
    weights = [(i + 1) ** -alpha for i in range(models)]
    arrivals, now = [], order.expovariate(rate)
    while now < seconds:
        model = f"m{order.choices(range(models), weights)[0]}"
        prompt, output = (_length(order, mean) for mean in lengths)
        arrivals.append(make(now, model, prompt, output))
        now += order.expovariate(rate)
    return arrivals


def _length(order: random.Random, mean: float, sigma: float = 0.9) -> int:
    return max(2, min(int(10 * mean), round(order.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def attainment(requests: Iterable[Request], scale: float = 8.0) -> float:
    """Part of the requests that took at most `scale` times what they take alone; refused ones did not."""
    met = [r.end > 0 and r.end - r.arrival <= scale * alone_seconds(r) for r in requests]
    return sum(met) / max(1, len(met))
