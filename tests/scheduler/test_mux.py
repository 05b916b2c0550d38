"""What `mux` adds to ADBS, one thing at a time, and how it compares in simulated time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from muxserve.scheduler.policy import create
from muxserve.scheduler.policy.interface import (
    AskAgain,
    Decision,
    DecodeJob,
    EndLease,
    Finished,
    JobEnded,
    Policy,
    PolicyOptions,
    PrefillJob,
    Refuse,
)
from tests.scheduler.timed import Arrival, TimedWorld, alone_seconds, attainment, skewed
from tests.scheduler.world import Request, Shape, World

SHAPE = Shape(21, 90, 64)
BLOCKS = 94_000
"""An arena of 512 MiB with SmolLM2-135M in it."""


def mux(**options: bool) -> Policy:
    return create("mux", PolicyOptions(**options))


def first_prefill(decisions: list[Decision]) -> list[int]:
    return [c.sequence for d in decisions if isinstance(d, PrefillJob) for c in d.chunks]


def taught(policy: Policy, model: str = "a") -> Policy:
    """It knows the device: 10 ms a step, 1 ms a token of a prompt."""
    for _ in range(20):
        policy.observe(JobEnded("prefill", model, 100, 0.1))
        policy.observe(JobEnded("decode", model, 8, 0.08, 8, 100))
    policy.observe(Finished(10_000, model, 10, 10, 1.0))
    return policy


def test_without_its_additions_it_decides_as_adbs_does() -> None:
    logs = []
    for name in ("adbs", "mux"):
        policy = create(name, PolicyOptions().plain())
        world = TimedWorld(policy, 20_000, {f"m{i}": SHAPE for i in range(4)})
        world.play(skewed(1, 10, 3, 1.3))
        logs.append(world.log)
    assert logs[0] == logs[1]


def test_a_short_request_goes_before_a_long_one_that_came_first() -> None:
    for slack in (True, False):
        world = World(taught(mux(slack=slack)), BLOCKS, {"a": SHAPE})
        world.add("a", 500, 300)
        world.now += 0.01
        short = world.add("a", 10, 5)
        assert (first_prefill(world.decide())[0] == short.number) == slack


def test_what_is_late_already_lets_others_pass_until_it_is_old() -> None:
    world = World(taught(mux()), BLOCKS, {"a": SHAPE})
    late = world.add("a", 10, 5)
    world.now += 10
    fresh = world.add("a", 10, 5)
    assert first_prefill(world.decide()) == [fresh.number, late.number]
    world = World(taught(mux()), BLOCKS, {"a": SHAPE})
    old = world.add("a", 10, 5)
    world.now += 60
    fresh = world.add("a", 10, 5)
    assert first_prefill(world.decide()) == [old.number, fresh.number]


def test_short_prompts_wait_for_others_while_something_decodes() -> None:
    for gather in (True, False):
        policy = taught(mux(gather=gather))
        for tokens in (1, 10, 200) * 20:  # a job takes 50 ms, whatever it computes
            policy.observe(JobEnded("prefill", "a", tokens, 0.05 + 0.0001 * tokens))
        world = World(policy, BLOCKS, {"a": SHAPE})
        for _ in range(3):
            world.add("a", 10, 100)
            world.now += 0.005
            world.decide()
        while world.prefills:
            world.advance(world.prefills[0])
            world.decide()
        assert any(isinstance(job.what, DecodeJob) for job in world.jobs.values())
        late = world.add("a", 10, 5)
        decisions = world.decide()
        assert first_prefill(decisions) == ([] if gather else [late.number])
        if gather:
            [again] = [d.at for d in decisions if isinstance(d, AskAgain)]
            other = world.add("a", 10, 5)
            world.now = again
            assert sorted(first_prefill(world.decide())) == [late.number, other.number]


def joining(**options: bool) -> World:
    """Something decodes in it, and decode jobs can have prompts."""
    policy = taught(mux(**options))
    for tokens in (1, 10, 200) * 20:  # a job takes 50 ms, whatever it computes
        policy.observe(JobEnded("prefill", "a", tokens, 0.05 + 0.0001 * tokens))
    world = World(policy, BLOCKS, {"a": SHAPE}, joins=True)
    world.add("a", 10, 100)
    world.decide()
    world.advance(world.prefills[0])
    world.decide()
    [lease] = world.jobs.values()
    world.advance(lease)
    return world


def leases(decisions: list[Decision]) -> list[DecodeJob]:
    return [d for d in decisions if isinstance(d, DecodeJob)]


def test_a_short_prompt_goes_along_with_what_decodes_of_its_model() -> None:
    for gather in (True, False):
        world = joining(gather=gather)
        short = world.add("a", 10, 5)
        decisions = world.decide()
        ended = [d for d in decisions if isinstance(d, EndLease)]
        if not gather:
            assert first_prefill(decisions) == [short.number] and not ended
            continue
        assert not first_prefill(decisions) and len(ended) == 1, "the next lease can have it"
        [lease] = leases(world.decide())
        assert [(c.sequence, c.start, c.end) for c in lease.prompts] == [(short.number, 0, 10)]
        before, after = world.jobs.values()
        world.advance(before)
        world.advance(after)
        assert (short.emitted, short.running, after.steps) == (1, True, 1)


@pytest.mark.parametrize(("batch", "joins"), [(2, True), (12, False)])
def test_a_model_that_fills_its_lane_does_not_take_prompts_along(batch: int, joins: bool) -> None:
    """Where its step takes longer than the others' together, everything else in its lane makes it later."""
    policy = mux()
    for model in "ab":
        for tokens in (1, 10, 200) * 20:
            policy.observe(JobEnded("prefill", model, tokens, 0.05 + 0.0001 * tokens))
        for size in (1, 8, 40) * 20:
            seconds = 8 * (0.01 + 0.002 * size)
            policy.observe(JobEnded("decode", model, 8 * size, seconds, 8, 100 * size, together=1.0))
    world = World(policy, BLOCKS, {"a": SHAPE, "b": SHAPE}, decode_lanes=2, joins=True)
    for model in "a" * batch + "bbb":
        world.add(model, 10, 1000)
    while any(not r.running and not r.decodes for r in world.requests.values()):
        world.now += 0.01
        world.decide()
        for job in list(world.jobs.values()):
            world.advance(job)
    short = world.add("a", 10, 5)
    taken: list[int] = []
    while not taken:
        decisions = world.decide()
        taken = [c.sequence for lease in leases(decisions) for c in lease.prompts] + first_prefill(decisions)
        for job in list(world.jobs.values()):
            if isinstance(job.what, DecodeJob):
                world.advance(job)
        world.now += 0.01
    assert taken == [short.number]
    assert bool(first_prefill(decisions)) is not joins


def test_a_long_prompt_or_one_with_a_target_has_a_job_of_its_own() -> None:
    world = joining()
    long = world.add("a", 5000, 5)
    assert first_prefill(world.decide()) == [long.number]
    world = joining()
    world.shapes["a"] = replace(SHAPE, ttft=0.5)
    due = world.add("a", 10, 5)
    assert first_prefill(world.decide()) == [due.number]
    world = joining()
    world.shapes["a"] = replace(SHAPE, tpot=0.05)
    paced = world.add("a", 10, 5)
    assert first_prefill(world.decide()) == [paced.number], "nobody's next token is to be late"


def test_a_prompt_that_no_lease_takes_along_is_computed_in_time() -> None:
    world = joining()
    late = world.add("a", 10, 5)
    world.decide()  # ends the lease
    world.now = world.ask_at if world.ask_at < math.inf else world.now + 1
    world.jobs.clear()
    for request in world.requests.values():
        request.jobs.clear()
    world.requests[1].computed = 0  # it was lost: nothing decodes
    assert late.number in first_prefill(world.decide())


def test_steps_are_told_apart_from_the_prompts_that_they_computed() -> None:
    latency = taught(mux(), "m0")._latency  # type: ignore[attr-defined]
    alone = latency.step("m0", 1)
    for _ in range(40):  # a prompt of 50 tokens takes 50 ms of it
        latency.observe(JobEnded("decode", "m0", 8, 0.13, 8, 100, prompts={"": 50}))
    assert latency.step("m0", 1) == pytest.approx(alone, rel=0.1)


def test_a_target_for_the_first_token_says_when_a_prompt_is_due() -> None:
    shapes = {"a": replace(SHAPE, ttft=5.0), "b": replace(SHAPE, ttft=0.5)}
    world = World(taught(mux()), BLOCKS, shapes)
    world.add("a", 10, 5)
    world.now += 0.1
    urgent = world.add("b", 200, 50)
    assert first_prefill(world.decide()) == [urgent.number]


def test_higher_priority_goes_first() -> None:
    for priorities in (True, False):
        world = World(taught(mux(priorities=priorities)), BLOCKS, {"a": SHAPE})
        world.add("a", 10, 5)
        high = world.add("a", 300, 50, priority=1)
        assert (first_prefill(world.decide())[0] == high.number) == priorities


def test_a_tenant_that_had_more_waits_behind_one_that_had_less() -> None:
    for fairness in (True, False):
        policy = taught(mux(fairness=fairness))
        world = World(policy, BLOCKS, {"a": SHAPE})
        world.add("a", 300, 50, tenant="greedy")
        world.decide()
        policy.observe(JobEnded("decode", "a", 5000, 1.0, 500, 100, tenants={"greedy": 5000}))
        world.advance(world.jobs[1])
        world.add("a", 10, 5, tenant="greedy")
        other = world.add("a", 100, 50, tenant="other")
        order = [
            n for d in world.decide() if isinstance(d, PrefillJob) for n in [c.sequence for c in d.chunks]
        ]
        assert order, "a prompt is computed"
        assert (order[0] == other.number) == fairness


def test_what_cannot_be_finished_in_time_is_refused_at_once_with_a_time_to_come_again() -> None:
    world = World(taught(mux()), BLOCKS, {"a": SHAPE})
    fits = world.add("a", 10, 10, deadline=1.0)
    hopeless = world.add("a", 100, 100, deadline=0.5)
    refused = [d for d in world.decide() if isinstance(d, Refuse)]
    assert [d.sequence for d in refused] == [hopeless.number]
    assert 0.1 <= refused[0].retry_after <= 30
    assert fits.number in world.requests
    world = World(taught(mux(admission=False)), BLOCKS, {"a": SHAPE})
    world.add("a", 100, 100, deadline=0.5)
    assert not any(isinstance(d, Refuse) for d in world.decide())


def test_a_batch_is_not_expected_to_take_as_long_as_one_sequence_after_the_other() -> None:
    policy = taught(mux())
    for sequences in range(1, 17):  # 10 ms, and half a millisecond each
        seconds = 8 * (0.010 + 0.0005 * sequences)
        policy.observe(JobEnded("decode", "a", 8 * sequences, seconds, 8, 100 * sequences))
    world = World(policy, BLOCKS, {"a": SHAPE})
    for _ in range(8):
        world.add("a", 10, 1000, deadline=30.0)
    assert not any(isinstance(d, Refuse) for d in world.decide())
    hopeless = world.add("a", 10, 1000, deadline=9.0)
    assert [d.sequence for d in world.decide() if isinstance(d, Refuse)] == [hopeless.number]


def test_nothing_is_refused_before_the_device_is_known() -> None:
    world = World(mux(), BLOCKS, {"a": SHAPE})
    world.add("a", 100, 100, deadline=0.5)
    assert not any(isinstance(d, Refuse) for d in world.decide())


def test_prefill_rests_where_it_would_cost_others_their_target() -> None:
    policy = taught(mux())
    world = World(policy, BLOCKS, {"a": replace(SHAPE, tpot=0.012)})
    running = world.add("a", 100, 200)
    running.emitted, running.computed, running.open, running.groups = 1, 100, True, 5
    world.add("a", 1000, 10)
    decisions = world.decide()
    (job,) = [d for d in decisions if isinstance(d, PrefillJob)]
    assert job.share < 0.5, "decode needs most of the device"
    world.advance(world.jobs[1] if isinstance(world.jobs[1].what, PrefillJob) else world.jobs[2])
    world.now += 0.01
    decisions = world.decide()
    assert not any(isinstance(d, PrefillJob) for d in decisions)
    assert any(isinstance(d, AskAgain) for d in decisions)
    world.now = world.ask_at
    assert any(isinstance(d, PrefillJob) for d in world.decide())


def play(name: str, arrivals: list[Arrival], models: int = 4) -> list[Request]:
    world = TimedWorld(create(name, PolicyOptions()), BLOCKS, {f"m{i}": SHAPE for i in range(models)})
    world.play(arrivals)
    return world.finished + world.refused


def test_under_three_times_the_load_admitted_requests_are_in_time_and_service_is_normal_afterwards() -> None:
    warm = skewed(9, 10, 2, 1.3)
    rush = [replace(a, at=a.at + 12, deadline=5.0) for a in skewed(7, 40, 13, 1.3)]
    after = [replace(a, at=a.at + 57, deadline=10.0) for a in skewed(8, 15, 1.5, 1.3)]
    requests = play("mux", warm + rush + after)
    rushed = [r for r in requests if 12 <= r.arrival < 52]
    served = [r for r in rushed if r.end]
    assert sum(r.end <= r.deadline for r in served) >= 0.95 * len(served)
    assert len(served) > 0.3 * len(rushed)
    assert attainment(r for r in requests if r.arrival >= 57) >= 0.97


def test_light_load_with_deadlines_is_served_right_after_a_flood_without_any() -> None:
    light = skewed(8, 20, 4, 1.3)
    world = TimedWorld(create("mux", PolicyOptions()), BLOCKS, {f"m{i}": SHAPE for i in range(4)})
    world.play(skewed(7, 10, 20, 1.3))
    begin = world.now + 1.0
    after = [replace(a, at=begin + a.at, deadline=8 * alone_seconds(a) + 0.3) for a in light]
    world.play(after)
    late = [r for r in world.finished if r.arrival >= begin and r.end > r.deadline]
    assert len(world.refused) + len(late) <= 0.02 * len(after)


def test_a_tenant_that_floods_moves_the_others_first_tokens_little() -> None:
    def ttft99(flood: bool) -> float:
        arrivals = []
        for number in range(4):
            rate = 4.0 if flood and number == 0 else 0.4
            arrivals += [replace(a, tenant=f"t{number}") for a in skewed(number, 60, rate, 1.3)]
        requests = [r for r in play("mux", arrivals) if r.tenant != "t0"]
        waits = sorted((r.first - r.arrival) / max(0.1, alone_seconds(r)) for r in requests)
        return waits[math.ceil(0.99 * len(waits)) - 1]

    assert ttft99(True) < 3 * ttft99(False)


def test_who_waits_for_far_more_than_others_makes_it_crowded_at_once() -> None:
    policy = taught(mux())
    policy.observe(JobEnded("decode", "a", 20, 0.1, 10, tenants={"many": 10, "few": 10}))
    world = World(policy, BLOCKS, {"a": SHAPE})
    world.add("a", 20, 10, tenant="few")
    for _ in range(30):
        world.add("a", 20, 10, tenant="many")
    world.decide()
    world.advance(world.prefills[0])  # of the one request of the other, and nothing else
    decisions = world.decide()
    assert len(first_prefill(decisions)) == 1, "jobs of who makes it crowded are brief"


def test_a_long_prompt_of_who_makes_it_crowded_comes_in_brief_jobs() -> None:
    for much in (True, False):
        policy = taught(mux())
        policy.observe(
            JobEnded("decode", "a", 1010, 0.1, 10, tenants={"much": 1000 if much else 10, "few": 10})
        )
        world = World(policy, BLOCKS, {"a": SHAPE})
        world.add("a", 20, 10, tenant="few")
        world.decide()
        world.advance(world.prefills[0])
        world.add("a", 200, 10, tenant="much")
        chunks = [c for d in world.decide() if isinstance(d, PrefillJob) for c in d.chunks]
        assert [(c.start, c.end) for c in chunks] == [(0, 32 if much else 200)]


def test_prompts_of_others_do_not_stop_for_good_what_the_one_decodes_that_crowds() -> None:
    world = TimedWorld(taught(mux(), "m0"), BLOCKS, {"m0": SHAPE})
    crowd = [Arrival(0.01 * n, "m0", 20, 100, tenant="much") for n in range(20)]
    flood = [Arrival(1.0 + 0.05 * n, "m0", 100, 2, tenant=f"t{n % 50}") for n in range(600)]
    world.play([*crowd, *flood])
    ends = [r.end for r in world.finished if r.tenant == "much"]
    assert max(ends) < 20, "prompts come for 30 s, and take longer than that"


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.3, 2.1])
def test_its_goodput_in_simulated_time_is_not_below_any_baseline(alpha: float) -> None:
    def goodput(name: str) -> float:
        rate = 0.5
        while True:
            met = [attainment(play(name, skewed(seed, 60, rate + 0.5, alpha))) for seed in (1, 2)]
            if sum(met) / 2 < 0.99:
                return rate
            rate += 0.5

    ours = goodput("mux")
    assert ours >= 1.5 * goodput("spatial")
    assert ours >= 1.3 * goodput("temporal")
    for name in ("adbs", "fcfs", "round_robin"):
        assert ours >= goodput(name)
