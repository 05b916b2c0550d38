"""The simulated unit: decode jobs that have prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from muxserve.placement.solver.placement import BLOCK_BYTES
from muxserve.scheduler import policy as service_policies
from muxserve.scheduler.policy.interface import (
    AskAgain,
    Chunk,
    Decision,
    DecodeJob,
    EndLease,
    Event,
    JobEnded,
    ModelSnapshot,
    PolicyOptions,
    Preempt,
    PrefillJob,
    Running,
    Snapshot,
    Waiting,
)
from muxserve.sim.arrivals import poisson
from muxserve.sim.cluster import Outcome, SimOptions, simulate
from muxserve.sim.executor import PASS_TOKENS
from muxserve.sim.requests import Request
from muxserve.sim.unit import Unit
from tests.placement.solver.inputs import COSTS
from tests.sim.inputs import together, two_models


class Scripted:
    """Decides what it was told to, once."""

    def __init__(self) -> None:
        self.next: list[Decision] = []
        self.seen: Snapshot
        self.heard: list[JobEnded] = []

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        self.seen = snapshot
        decisions, self.next = self.next, []
        return decisions

    def observe(self, event: Event) -> None:
        if isinstance(event, JobEnded):
            self.heard.append(event)


class Bench:
    """A unit of one model, and its script."""

    def __init__(self, compute_units: int = 4, order_seconds: float = 0.0) -> None:
        self.policy = Scripted()
        self.over: list[Request] = []
        model = two_models().models[0]
        self.unit = Unit(
            self.policy,
            [(model, 1.0)],
            COSTS,
            degree=1,
            kv_bytes=100_000 * BLOCK_BYTES,
            slots=8,
            ahead=8,
            finished=self.over.append,
            compute_units=compute_units,
            order_seconds=order_seconds,
        )
        self.name = model.name
        self.books = self.unit.models[self.name]

    def deliver(self, number: int, prompt: int = 100, output: int = 20) -> Request:
        request = Request(number, self.name, self.unit.executor.now, prompt, output)
        self.unit.deliver(request)
        return request

    def decide(self, *decisions: Decision) -> ModelSnapshot:
        """Have it carry these out; what the policy sees then."""
        self.policy.next = list(decisions)
        for _ in range(2):
            self.unit.decide()
            self.unit.check()
        (model,) = self.policy.seen.models
        return model

    def end(self) -> ModelSnapshot:
        """Let what runs come to its end; what the policy sees then."""
        while not self.unit.advance(self.unit.next_event()):
            self.unit.check()
        return self.decide()

    def running(self, number: int, prompt: int = 100, output: int = 20) -> Request:
        """A request that has its first token."""
        request = self.deliver(number, prompt, output)
        self.decide(PrefillJob(self.name, (Chunk(number, 0, prompt),), 0.5))
        self.end()
        self.policy.heard.clear()
        return request

    def lease(self, *prompts: Chunk, sequences: tuple[int, ...] = (), steps: int = 8) -> DecodeJob:
        return DecodeJob(self.name, sequences, steps, 0.5, prompts=prompts)


def beyond(prompt: int) -> float:
    """Seconds that prompts of so many tokens add to a step."""
    few, more = (COSTS.prefill("llama-7b", 1, 1.0, 1, PASS_TOKENS + n) for n in (0, prompt))
    return more - few


@pytest.mark.parametrize("units", [0, 4])
def test_prompts_may_join_where_shares_are_made_of_cores(units: int) -> None:
    bench = Bench(units)
    bench.decide()
    assert bench.policy.seen.joins is (units > 0)


def test_a_prompt_that_joins_has_its_first_token_at_the_end_of_the_first_step() -> None:
    bench = Bench()
    old, new = bench.running(1), bench.deliver(2, prompt=300)
    start = bench.unit.executor.now
    bench.decide(bench.lease(Chunk(2, 0, 300), sequences=(1,)))
    model = bench.end()
    assert (old.emitted, new.emitted) == (9, 8), "a token per step; the first was of the prompt"
    step = COSTS.decode("llama-7b", 1, 1.0, 2, (101 + 300) / 2 + 4)
    assert new.first - start == pytest.approx(step + beyond(300))
    assert bench.unit.executor.now - start == pytest.approx(8 * step + beyond(300))
    assert [(r.sequence, r.length, r.in_job) for r in model.running] == [(1, 109, False), (2, 308, False)]
    assert model.waiting == ()
    (event,) = bench.policy.heard
    assert (event.tokens, event.steps, event.prompts) == (16, 8, {"": 300})
    assert event.seconds == pytest.approx(bench.unit.executor.now - start)
    assert event.context == 101, "of the prompt nothing was known before"
    bench.decide(bench.lease(sequences=(1, 2), steps=32))
    bench.end()
    assert bench.over == [old, new]
    assert bench.policy.heard[-1].prompts == {}
    assert bench.unit.available == bench.unit.total
    assert bench.books.open == 0


def test_what_joined_is_seen_as_running_in_a_job_with_slot_and_blocks_for_all_steps() -> None:
    bench = Bench()
    bench.deliver(1, prompt=30, output=200)
    before = bench.decide()
    model = bench.decide(bench.lease(Chunk(1, 0, 30), steps=70))
    groups = bench.books.groups(30 + 70 - 1)
    assert model.waiting == ()
    assert model.running == (Running(1, 0.0, 30, 230, groups, in_job=True, decoded=True, prompt=30),)
    assert model.slots_free == before.slots_free - 1
    assert model.held == groups * model.blocks_per_span


def test_blocks_end_where_the_request_does() -> None:
    bench = Bench()
    request = bench.deliver(1, prompt=30, output=3)
    model = bench.decide(bench.lease(Chunk(1, 0, 30), steps=1000))
    assert model.held == bench.books.groups(32) * model.blocks_per_span
    bench.end()
    assert bench.over == [request]
    assert request.emitted == 3
    step = COSTS.decode("llama-7b", 1, 1.0, 1, 30 + 500)
    assert request.first == pytest.approx(step + beyond(30))
    assert request.finish == pytest.approx(request.first + 2 * step)


def test_a_request_of_one_token_is_over_with_the_first_step() -> None:
    bench = Bench()
    request = bench.deliver(1, output=1)
    bench.decide(bench.lease(Chunk(1, 0, 100), steps=4))
    bench.end()
    assert bench.over == [request]
    assert request.finish == pytest.approx(request.first)
    assert bench.policy.heard[0].tokens == 1


def test_what_is_left_of_a_prompt_joins() -> None:
    bench = Bench()
    request = bench.deliver(1, prompt=300)
    bench.decide(PrefillJob(bench.name, (Chunk(1, 0, 200),), 0.5))
    model = bench.end()
    assert model.waiting[0].computed == 200
    slots = model.slots_free
    start = bench.unit.executor.now
    model = bench.decide(bench.lease(Chunk(1, 200, 300), steps=2))
    assert model.slots_free == slots, "it had one"
    bench.end()
    event = bench.policy.heard[-1]
    assert (event.prompts, event.context, event.tokens) == ({"": 100}, 200, 2)
    step = COSTS.decode("llama-7b", 1, 1.0, 1, 301)
    assert request.first - start == pytest.approx(step + beyond(100))


def test_of_a_lease_that_ended_before_it_ran_prompts_wait_as_before() -> None:
    bench = Bench(order_seconds=0.01)
    request = bench.deliver(1, prompt=300)
    bench.decide(PrefillJob(bench.name, (Chunk(1, 0, 200),), 0.5))
    bench.end()
    bench.policy.heard.clear()
    model = bench.decide(bench.lease(Chunk(1, 200, 300)))
    assert [r.sequence for r in model.running] == [1]
    held = model.held
    bench.decide(EndLease(bench.policy.seen.jobs[0].job))
    model = bench.end()
    groups = bench.books.groups(307)
    assert model.waiting == (Waiting(1, 0.0, 300, computed=200, groups=groups, open=True, limit=320),)
    assert (model.running, model.held) == ((), held)
    assert (request.emitted, request.first, bench.policy.heard) == (0, -1.0, [])
    bench.decide(bench.lease(Chunk(1, 200, 300), steps=32))
    bench.end()
    assert bench.over == [request]
    assert bench.unit.available == bench.unit.total


def test_a_lease_that_is_ended_in_its_first_step_keeps_the_token_of_the_prompt() -> None:
    bench = Bench()
    request = bench.deliver(1)
    bench.decide(bench.lease(Chunk(1, 0, 100)))
    first = bench.unit.next_event()
    bench.unit.advance(first / 2)
    bench.decide(EndLease(bench.policy.seen.jobs[0].job))
    model = bench.end()
    assert (request.emitted, request.first) == (1, first)
    assert [(r.sequence, r.length) for r in model.running] == [(1, 101)]


@pytest.mark.parametrize("began", [False, True])
def test_one_that_joined_and_is_preempted_waits_for_all_of_its_tokens(began: bool) -> None:
    bench = Bench(order_seconds=0.01)
    old, new = bench.running(1), bench.deliver(2)
    model = bench.decide(bench.lease(Chunk(2, 0, 100), sequences=(1,)))
    blocks = bench.books.groups(107) * model.blocks_per_span
    if began:
        bench.unit.advance(bench.unit.next_event())
        bench.unit.advance(bench.unit.executor.now + 0.001)
    model = bench.decide(Preempt(2))
    assert [(w.sequence, w.computed, w.groups, w.open) for w in model.waiting] == [(2, 0, 0, False)]
    assert (model.closing, [r.sequence for r in model.running]) == (blocks, [1])
    model = bench.end()
    assert (old.emitted, new.emitted, new.first) == (2 if began else 1, 0, -1.0)
    assert (model.closing, model.slots_free) == (0, 7)
    assert [(e.tokens, e.prompts) for e in bench.policy.heard] == ([(1, {"": 100})] if began else [])
    bench.decide(bench.lease(Chunk(2, 0, 100), sequences=(1,), steps=32))
    bench.end()
    assert sorted(r.number for r in bench.over) == [1, 2]
    assert bench.unit.available == bench.unit.total


def test_what_is_recomputed_in_a_lease_keeps_the_time_of_its_first_token() -> None:
    bench = Bench()
    request = bench.running(1)
    first = request.first
    bench.decide(Preempt(1))
    bench.decide(bench.lease(Chunk(1, 0, 101), steps=4))
    model = bench.end()
    assert (request.first, request.emitted) == (first, 5)
    assert bench.policy.heard[-1].prompts == {"": 101}
    assert model.running[0].length == 105


class Joining:
    """Has every prompt join a lease, ends leases by chance and preempts now and then."""

    def __init__(self, options: PolicyOptions) -> None:
        self.random = random.Random(5)
        self.heard: list[JobEnded] = []

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        decoding = {job.model for job in snapshot.jobs}
        jobs = [job.job for job in snapshot.jobs if not job.ending and self.random.random() < 0.2]
        decisions: list[Decision] = [AskAgain(now + 0.05), *map(EndLease, jobs)]
        for model in snapshot.models:
            if model.running and self.random.random() < 0.02:
                decisions.append(Preempt(self.random.choice(model.running).sequence))
            elif model.model not in decoding:
                room = model.slots_free
                begun = [w for w in model.waiting if w.open]
                chosen = begun + [w for w in model.waiting if not w.open][:room]
                sequences = tuple(r.sequence for r in model.running)
                prompts = tuple(Chunk(w.sequence, w.computed, w.tokens) for w in chosen)
                if sequences or prompts:
                    decisions.append(DecodeJob(model.model, sequences, 16, 0.5, prompts=prompts))
        return decisions

    def observe(self, event: Event) -> None:
        if isinstance(event, JobEnded):
            self.heard.append(event)


def test_all_are_served_in_full_and_the_same_way_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Joining] = []

    def make(options: PolicyOptions) -> Joining:
        made.append(Joining(options))
        return made[-1]

    monkeypatch.setitem(service_policies.POLICIES, "joining", make)
    work = two_models(1.0)
    arrivals = poisson(work, 60, 1)
    options = SimOptions("joining", slots=16, compute_units=4, order_seconds=0.002, checked=True)

    def run() -> Outcome:
        return simulate(together(work, 0), work, COSTS, arrivals, 60, options)

    first, second = run(), run()
    assert first.preemptions > 10
    for request in first.requests:
        assert request.emitted == request.output
        assert request.arrival < request.first <= request.finish
    assert [(r.first, r.finish) for r in first.requests] == [(r.first, r.finish) for r in second.requests]
    assert made[0].heard == made[1].heard
    computed = sum(sum(e.prompts.values()) for e in made[0].heard)
    assert computed > sum(r.prompt for r in first.requests), "all, and those that were preempted again"
    assert sum(e.tokens for e in made[0].heard) == sum(r.output for r in first.requests)
