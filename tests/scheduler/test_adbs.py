"""What ADBS decides, one situation at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxserve.scheduler.policy import create
from muxserve.scheduler.policy.interface import (
    AdaptQuotas,
    Decision,
    DecodeJob,
    EndLease,
    JobEnded,
    Policy,
    PolicyOptions,
    Preempt,
    PrefillJob,
)
from tests.scheduler.world import Job, Request, Shape, World


def adbs(**options: float) -> Policy:
    return create("adbs", PolicyOptions(**options))  # type: ignore[arg-type]


def lending(**options: float) -> Policy:
    """ADBS, and what nobody claims is lent."""
    return create("mux", replace(PolicyOptions(**options).plain(), borrow=True))  # type: ignore[arg-type]


def prefills(decisions: Sequence[Decision]) -> list[PrefillJob]:
    return [d for d in decisions if isinstance(d, PrefillJob)]


def decodes(decisions: Sequence[Decision]) -> list[DecodeJob]:
    return [d for d in decisions if isinstance(d, DecodeJob)]


def preempted(decisions: Sequence[Decision]) -> list[int]:
    return [d.sequence for d in decisions if isinstance(d, Preempt)]


def job(world: World, kind: type[PrefillJob] | type[DecodeJob]) -> Job:
    (found,) = [j for j in world.jobs.values() if isinstance(j.what, kind)]
    return found


def running(world: World, model: str, prompt: int, output: int, decoded: bool = True) -> Request:
    """A sequence that has its prompt computed and its first token, in no job."""
    request = world.add(model, prompt, output)
    request.emitted, request.computed, request.open, request.decoded = 1, prompt, True, decoded
    request.groups = -(-prompt // world.shapes[model].tokens_per_block)
    world.now += 1
    return request


def test_prefill_goes_round_robin_over_models_one_job_at_a_time() -> None:
    world = World(adbs(), 1000, {name: Shape(4, 1, 8) for name in "abc"})
    for name in "abc":
        for _ in range(2):
            world.add(name, 100, 5)
    served = []
    for _ in range(6):
        decisions = world.decide()
        (started,) = prefills(decisions)
        served.append(started.model)
        assert prefills(world.decide()) == [], "one prefill at a time"
        world.advance(job(world, PrefillJob))
    assert served == ["a", "b", "c", "a", "b", "c"]


def test_short_prompts_share_a_job_and_long_ones_come_in_chunks() -> None:
    world = World(adbs(chunk_tokens=64), 1000, {"a": Shape(4, 1, 8)})
    for prompt in (10, 20, 100):
        world.add("a", prompt, 5)
    (first,) = prefills(world.decide())
    assert [(c.sequence, c.start, c.end) for c in first.chunks] == [(1, 0, 10), (2, 0, 20), (3, 0, 34)]
    world.advance(job(world, PrefillJob))
    (second,) = prefills(world.decide())
    assert [(c.sequence, c.start, c.end) for c in second.chunks] == [(3, 34, 98)]
    world.advance(job(world, PrefillJob))
    (third,) = prefills(world.decide())
    assert [(c.sequence, c.start, c.end) for c in third.chunks] == [(3, 98, 100)]


def test_chunks_shrink_to_what_the_device_does_in_time() -> None:
    policy = adbs(chunk_tokens=512, chunk_seconds=0.5)
    world = World(policy, 10_000, {"a": Shape(4, 1, 8)})
    world.add("a", 2000, 5)
    (first,) = prefills(world.decide())
    assert first.chunks[0].end == 128, "careful at first"
    for _ in range(20):
        policy.observe(JobEnded("prefill", "a", 128, 1.28))
    world.jobs.clear()
    for request in world.requests.values():
        request.jobs, request.computed = [], 128
    (second,) = prefills(world.decide())
    assert second.chunks[0].end - second.chunks[0].start == 50, "100 tokens/s for half a second"


def test_jobs_say_their_shares_and_a_prefill_ends_no_lease() -> None:
    world = World(adbs(prefill_share=0.4, decode_share=0.6), 1000, {"a": Shape(4, 1, 8)})
    world.add("a", 10, 50)
    assert prefills(world.decide())[0].share == 0.4
    world.advance(job(world, PrefillJob))
    assert decodes(world.decide())[0].share == 0.6
    world.add("a", 10, 50)
    (prefill,) = world.decide()
    assert isinstance(prefill, PrefillJob)


def test_decode_takes_turns_and_leases_get_shorter_with_company() -> None:
    world = World(adbs(lease_steps=8), 1000, {name: Shape(4, 1, 8) for name in "ab"})
    for name in "ab":
        running(world, name, 10, 50)
    served = []
    for _ in range(4):
        (lease,) = decodes(world.decide())
        assert lease.steps == 4
        served.append(lease.model)
        for _ in range(4):
            world.advance(job(world, DecodeJob))
    assert served == ["a", "b", "a", "b"]


def test_a_sequence_that_finished_its_prefill_joins_the_batch_at_once() -> None:
    world = World(adbs(), 1000, {"a": Shape(4, 1, 8)})
    running(world, "a", 10, 50)
    world.decide()
    running(world, "a", 10, 50, decoded=False)
    assert world.decide() == [], "the lease may not have done a step yet"
    world.advance(job(world, DecodeJob))
    assert world.decide() == [EndLease(1)]
    world.advance(job(world, DecodeJob))
    assert decodes(world.decide())[0].sequences == (1, 2)


def test_a_prefill_that_does_not_fit_stops_the_admission_of_decodes_that_take_blocks() -> None:
    world = World(adbs(lease_steps=1), 30, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 17, "b": 13}
    old = running(world, "a", 40, 50)
    new = running(world, "a", 8, 50, decoded=False)
    roomy = running(world, "a", 9, 50, decoded=False)
    waiting = world.add("b", 60, 5)
    decisions = world.decide()
    assert prefills(decisions) == [], "15 blocks are not free"
    assert decodes(decisions)[0].sequences == (old.number, roomy.number)
    assert new.number not in preempted(decisions)
    old.output = 1
    world.end(job(world, DecodeJob))
    del world.requests[old.number]
    decisions = world.decide()
    assert prefills(decisions)[0].chunks[0].sequence == waiting.number
    assert decodes(decisions)[0].sequences == (new.number, roomy.number), "and now they may"


def test_nobody_is_admitted_before_a_prefill_that_is_entitled_and_waits() -> None:
    world = World(adbs(), 40, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 20, "b": 20}
    running(world, "a", 60, 50)
    running(world, "a", 20, 50)
    world.add("a", 8, 5)
    world.add("b", 78, 5)
    assert prefills(world.decide()) == [], "the short one of a would fit, but b is entitled and waits"


def test_what_nobody_wants_is_lent_beyond_the_quota() -> None:
    world = World(lending(), 100, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 10, "b": 90}
    for _ in range(3):
        world.add("a", 40, 50)
    for chunks in (1, 2):
        (started,) = prefills(world.decide())
        assert len(started.chunks) == chunks, "first within the quota, then what is lent"
        world.advance(job(world, PrefillJob))
    assert world.snapshot().models[0].held >= 30


def test_borrowed_blocks_are_given_back_newest_first_when_their_owner_wants_them() -> None:
    world = World(lending(lease_steps=1), 100, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 40, "b": 60}
    holders = [running(world, "a", 79, 40) for _ in range(4)]
    world.add("b", 120, 5)
    decisions = world.decide()
    assert preempted(decisions) == [holders[3].number], "20 are free, 30 are wanted"
    assert prefills(decisions)[0].model == "b"


def test_a_model_above_its_quota_preempts_nobody_to_begin() -> None:
    world = World(lending(), 100, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 50, "b": 50}
    running(world, "b", 190, 200)
    running(world, "a", 190, 200)
    world.add("a", 40, 5)
    decisions = world.decide()
    assert preempted(decisions) == []
    assert prefills(decisions) == []


def test_decodes_without_blocks_preempt_the_newest_of_the_model_most_above_its_quota() -> None:
    world = World(lending(), 30, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 20, "b": 10}
    oldest = running(world, "a", 40, 50)
    borrowers = [running(world, "b", 32, 50), running(world, "b", 40, 50)]
    newest = running(world, "a", 8, 50)
    decisions = world.decide()
    assert preempted(decisions)[0] == borrowers[1].number
    assert oldest.number not in preempted(decisions)
    assert newest.number not in preempted(decisions)


def test_the_oldest_sequence_is_never_preempted() -> None:
    world = World(lending(), 25, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 5, "b": 20}
    oldest = running(world, "a", 80, 15)
    newer = running(world, "b", 16, 50)
    while not preempted(decisions := world.decide()):
        world.advance(job(world, DecodeJob))
    assert preempted(decisions) == [newer.number], "although a is the one above its quota"
    assert decodes(decisions)[0].sequences == (oldest.number,)


def test_leases_shorten_before_anybody_is_preempted() -> None:
    world = World(adbs(lease_steps=8), 12, {"a": Shape(4, 1, 8)})
    world.quotas = {"a": 12}
    for _ in range(2):
        running(world, "a", 19, 50)
    decisions = world.decide()
    assert preempted(decisions) == []
    assert decodes(decisions)[0].steps == 4, "one more block each is all there is"


def test_quotas_start_by_rate_and_blocks_per_token_and_keep_a_floor() -> None:
    shapes = {
        "busy": Shape(4, 2, 8, rate=8.0),
        "idle": Shape(4, 2, 8, rate=0.001),
        "big": Shape(2, 4, 8, rate=2.0),
    }
    world = World(adbs(min_share=0.3), 3000, shapes)
    (decision,) = world.decide()
    assert isinstance(decision, AdaptQuotas)
    quotas = decision.quotas
    assert sum(quotas.values()) <= 3000
    assert quotas["idle"] >= 300
    assert quotas["busy"] == quotas["big"], "four times the rate, a quarter of the blocks per token"


def test_a_pinned_quota_stays_and_the_others_share_the_rest() -> None:
    world = World(adbs(), 1000, {"a": Shape(4, 1, 8, pinned=250), "b": Shape(4, 1, 8), "c": Shape(4, 1, 8)})
    world.decide()
    assert world.quotas == {"a": 250, "b": 375, "c": 375}


def test_quotas_move_from_who_leaves_them_unused_to_who_is_short_but_never_below_the_floor() -> None:
    world = World(adbs(adapt_seconds=5, min_share=0.2), 1000, {"a": Shape(4, 1, 4), "b": Shape(4, 1, 4)})
    world.decide()
    assert world.quotas == {"a": 500, "b": 500}
    for _ in range(4):
        running(world, "a", 480, 50)
        world.add("a", 480, 50)
    history = []
    for _ in range(60):
        world.decide()
        world.jobs.clear()
        for request in world.requests.values():
            request.jobs = []
        world.now += 1
        history.append(world.quotas["a"])
    assert history == sorted(history), "steadily"
    assert 540 < history[-1] < 900
    assert world.quotas["b"] >= 100
    assert sum(world.quotas.values()) == 1000


def test_quotas_of_an_arena_that_has_shrunk_are_made_anew() -> None:
    world = World(adbs(), 100, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})
    world.quotas = {"a": 400, "b": 50}
    world.decide()
    assert world.quotas == {"a": 50, "b": 50}
