"""The simulated executor: jobs take what the cost model says, and share the mesh with those beside them."""

from __future__ import annotations

from typing import Literal

import pytest

from muxserve.placement.solver.contention import Beside, bandwidth_use, slowdown
from muxserve.placement.solver.cost import parse_costs
from muxserve.placement.solver.shapes import SHAPES
from muxserve.sim.executor import PASS_TOKENS, Executor, Work
from tests.placement.solver.inputs import COSTS

SHAPE = SHAPES["llama-7b"]


def work(number: int, kind: Literal["prefill", "decode"], share: float = 0.5, steps: int = 1) -> Work:
    return Work(number, kind, "m", "llama-7b", SHAPE, 4, 128, share, steps)


def seconds(kind: str, share: float) -> float:
    return (COSTS.prefill if kind == "prefill" else COSTS.decode)("llama-7b", 1, share, 4, 128)


def run(executor: Executor) -> dict[int, float]:
    """When each job has ended, in order."""
    ended: dict[int, float] = {}
    while (at := executor.next_end()) != float("inf"):
        ended |= {w.number: at for w in executor.advance(at)}
    return ended


def test_a_job_alone_has_all_of_the_mesh() -> None:
    executor = Executor(COSTS, 1)
    executor.start(work(1, "decode", steps=10))
    assert run(executor) == pytest.approx({1: 10 * seconds("decode", 1.0)})
    assert executor.busy == pytest.approx(10 * seconds("decode", 1.0))


def test_jobs_of_a_kind_run_one_after_the_other() -> None:
    executor = Executor(COSTS, 1)
    executor.start(work(1, "prefill"))
    executor.start(work(2, "prefill"))
    one = seconds("prefill", 1.0)
    assert run(executor) == pytest.approx({1: one, 2: 2 * one})


def test_beside_another_kind_a_job_has_its_share_until_it_is_alone() -> None:
    executor = Executor(COSTS, 1)
    prefill, decode = work(1, "prefill"), work(2, "decode", steps=100)
    executor.start(prefill)
    executor.start(decode)
    ended = run(executor)
    both = slowdown(
        *(Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, seconds(kind, 0.5))) for kind in ("prefill", "decode"))
    )
    first = seconds("prefill", 0.5) * both
    assert ended[1] == pytest.approx(first)
    steps = first / (seconds("decode", 0.5) * both)
    assert ended[2] == pytest.approx(first + (100 - steps) * seconds("decode", 1.0))
    assert decode.beside == pytest.approx(first)


def test_shares_that_overlap_take_turns_on_the_sms() -> None:
    assert slowdown(Beside(0.7, 0.1), Beside(0.7, 0.1)) == pytest.approx(1.4)
    assert slowdown(Beside(0.5, 0.8), Beside(0.5, 0.6)) == pytest.approx(1.4)
    assert slowdown(Beside(0.3, 0.2), Beside(0.5, 0.6)) == 1.0


def test_a_lease_ends_with_the_step_that_runs() -> None:
    executor = Executor(COSTS, 1)
    lease = work(1, "decode", steps=10)
    executor.start(lease)
    step = seconds("decode", 1.0)
    executor.advance(2.5 * step)
    executor.end_lease(lease)
    assert run(executor) == pytest.approx({1: 3 * step})
    assert round(lease.done) == 3


def test_a_lease_that_has_not_begun_ends_without_a_step() -> None:
    executor = Executor(COSTS, 1)
    executor.start(work(1, "decode", steps=4))
    executor.advance(0.001)
    later = work(2, "decode", steps=4)
    executor.start(later)
    executor.end_lease(later)
    assert list(run(executor)) == [1, 2]
    assert later.done == 0


def test_decode_jobs_of_two_models_run_side_by_side_where_there_are_lanes_for_them() -> None:
    executor = Executor(COSTS, 1, units=2, decode_lanes=2)
    one, other, third = (work(n, "decode", steps=10) for n in (1, 2, 3))
    other.name = "n"
    for each in (one, third, other):
        executor.start(each)
    beside = Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, seconds("decode", 0.5)))
    both = seconds("decode", 0.5) * slowdown(beside, beside)
    ended = run(executor)
    assert ended[1] == ended[2] == pytest.approx(10 * both), "a core each"
    assert ended[3] == pytest.approx(10 * both + 10 * seconds("decode", 1.0))
    assert one.together == pytest.approx(one.busy)
    assert (third.together, one.beside) == (0.0, 0.0)


def test_an_exclusive_decode_job_waits_for_all_lanes_and_those_behind_it_for_its_end() -> None:
    executor = Executor(COSTS, 1, units=2, decode_lanes=2)
    one, large, third = (work(n, "decode", steps=10) for n in (1, 2, 3))
    large.name, large.exclusive = "n", True
    for each in (one, large, third):
        executor.start(each)
    ended = run(executor)
    step = seconds("decode", 1.0)
    assert [ended[n] for n in (1, 2, 3)] == pytest.approx([10 * step, 20 * step, 30 * step])
    assert (one.together, large.together) == (0.0, 0.0)


def test_a_prefill_job_leaves_decode_jobs_the_cores_that_it_does_not_have() -> None:
    executor = Executor(COSTS, 1, units=2, decode_lanes=2)
    prefill, one, other = work(1, "prefill", 0.3), work(2, "decode", steps=50), work(3, "decode", steps=50)
    other.name = "n"
    for each in (prefill, one, other):
        executor.start(each)
    executor.advance(min(executor.next_end(), 1e-3))
    assert (prefill.had, one.had) == (0.5, 0.5), "a core each, whatever the shares"
    assert other.began < 0, "there is no third core"
    run(executor)
    assert other.done == pytest.approx(50)
    assert prefill.beside == pytest.approx(prefill.busy)


def test_one_core_is_shared_by_time() -> None:
    executor = Executor(COSTS, 1, units=1)
    prefill, decode = work(1, "prefill", 0.9), work(2, "decode", 0.1, steps=10_000)
    executor.start(prefill)
    executor.start(decode)
    assert executor.next_end() == pytest.approx(seconds("prefill", 0.5), rel=0.3)


def test_an_order_takes_its_time_but_for_a_lease_that_follows_on_another() -> None:
    executor = Executor(COSTS, 1, order_seconds=0.01)
    step = seconds("decode", 1.0)
    lease, next_one = work(1, "decode", steps=4), work(2, "decode", steps=4)
    executor.start(lease)
    assert executor.next_end() == pytest.approx(0.01), "nothing runs until it is there"
    executor.advance(executor.next_end())
    assert executor.next_end() == pytest.approx(0.01 + 4 * step)
    executor.advance(executor.next_end())
    executor.start(next_one)
    assert executor.next_end() == pytest.approx(0.01 + 8 * step), "it was sent ahead"
    executor.advance(0.01 + 5.5 * step)
    executor.end_lease(next_one)
    executor.advance(executor.next_end())
    executor.start(third := work(3, "decode", steps=1))
    executor.start(prefill := work(4, "prefill"))
    assert third.ready == executor.now == pytest.approx(0.01 + 6 * step), "also after one that ended early"
    run(executor)
    assert prefill.began == pytest.approx(0.02 + 6 * step)


def test_a_lease_takes_time_beside_its_steps() -> None:
    executor = Executor(COSTS, 1, lease_seconds=0.005)
    step = seconds("decode", 1.0)
    first, second, dropped = (work(n, "decode", steps=2) for n in (1, 2, 3))
    for each in (first, second, dropped):
        executor.start(each)
    executor.end_lease(dropped)
    one = 0.005 + 2 * step
    assert run(executor) == pytest.approx({1: one, 2: 2 * one, 3: 2 * one})
    assert first.busy == pytest.approx(one), "lanes are busy meanwhile, and policies hear of that"
    executor.start(prefill := work(4, "prefill"))
    run(executor)
    assert prefill.busy == pytest.approx(seconds("prefill", 1.0))


def test_decode_jobs_that_run_go_on_when_a_prefill_comes() -> None:
    executor = Executor(COSTS, 1, units=2, decode_lanes=2)
    one, other, later = (work(n, "decode", steps=50) for n in (1, 2, 3))
    other.name, later.name = "n", "o"
    for each in (one, other):
        executor.start(each)
    executor.advance(1e-3)
    for each in (later, prefill := work(4, "prefill")):
        executor.start(each)
    executor.advance(min(executor.next_end(), 2e-3))
    assert (one.began, other.began, prefill.began) == (0.0, 0.0, 1e-3)
    assert later.began < 0, "two jobs of three are enough for two cores"
    assert one.beside == other.beside == pytest.approx(prefill.busy)


def test_steps_beside_those_of_another_model_take_what_was_measured_of_that() -> None:
    cell = {"prefill": 40, "decoding": 30, "together": 20}
    table = {"llama-7b": {"1": {"100": {"1": {"16": {"prefill": 20, "decoding": 10}}}}}}
    table["llama-7b"]["1"]["50"] = {"1": {"16": cell}}
    executor = Executor(parse_costs(table), 1, units=2, decode_lanes=2)
    one, other = (Work(n, "decode", f"m{n}", "llama-7b", SHAPE, 1, 16, 0.5, 10) for n in (1, 2))
    executor.start(one)
    executor.start(other)
    beside = Beside(0.5, bandwidth_use(SHAPE, 1, 16, 0.02))
    executor.advance(executor.next_end())
    assert one.shared == pytest.approx(0.02)
    assert one.busy == pytest.approx(0.2 * slowdown(beside, beside))


def joining(number: int, steps: int, prompt: int = 200) -> Work:
    """A decode job with prompts."""
    job = work(number, "decode", steps=steps)
    job.prompt = prompt
    return job


def beyond(share: float, prompt: int = 200) -> float:
    """Seconds that the prompts add to a step."""
    few, more = (COSTS.prefill("llama-7b", 1, share, 1, PASS_TOKENS + n) for n in (0, prompt))
    return more - few


def test_the_first_step_takes_longer_by_what_its_prompts_cost() -> None:
    executor = Executor(COSTS, 1, units=4, lease_seconds=0.005)
    executor.start(lease := joining(1, steps=10))
    first = 0.005 + seconds("decode", 1.0) + beyond(1.0)
    assert beyond(1.0) > 0
    assert executor.next_end() == pytest.approx(first), "and its end is told of"
    assert executor.advance(executor.next_end()) == []
    assert (lease.done, lease.first) == (1.0, executor.now)
    assert run(executor) == pytest.approx({1: first + 9 * seconds("decode", 1.0)})
    assert lease.busy == executor.busy == pytest.approx(executor.now)


def test_a_prompt_costs_less_in_a_step_than_in_a_job_of_its_own() -> None:
    assert beyond(1.0) < COSTS.prefill("llama-7b", 1, 1.0, 1, 200)


def test_a_lease_of_one_step_ends_with_its_prompts() -> None:
    executor = Executor(COSTS, 1, units=4)
    executor.start(lease := joining(1, steps=1))
    ended = run(executor)
    assert ended == pytest.approx({1: seconds("decode", 1.0) + beyond(1.0)})
    assert lease.first == ended[1]


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_lease_that_is_ended_in_its_first_step_computes_its_prompts(part: float) -> None:
    executor = Executor(COSTS, 1, units=4)
    executor.start(lease := joining(1, steps=10))
    first = executor.next_end()
    executor.advance(part * first)
    executor.end_lease(lease)
    assert run(executor) == pytest.approx({1: first})
    assert (lease.done, lease.first) == (1.0, executor.now)


def test_a_lease_that_is_ended_after_its_first_step_ends_with_the_one_that_runs() -> None:
    executor = Executor(COSTS, 1, units=4)
    executor.start(lease := joining(1, steps=10))
    executor.advance(executor.next_end())
    executor.advance(executor.now + 0.5 * seconds("decode", 1.0))
    executor.end_lease(lease)
    assert run(executor) == pytest.approx({1: lease.first + seconds("decode", 1.0)})


def test_a_lease_with_prompts_that_has_not_begun_computes_none() -> None:
    executor = Executor(COSTS, 1, units=4)
    executor.start(work(1, "decode", steps=4))
    executor.advance(0.001)
    executor.start(later := joining(2, steps=4))
    executor.end_lease(later)
    ended = run(executor)
    assert ended[1] == ended[2] == pytest.approx(4 * seconds("decode", 1.0))
    assert (later.done, later.busy) == (0, 0)
    assert later.first < 0


def test_prompts_take_longer_while_a_neighbour_is_there() -> None:
    executor = Executor(COSTS, 1, units=2)
    executor.start(lease := joining(1, steps=50))
    alone = seconds("decode", 1.0) + beyond(1.0)
    executor.advance(0.25 * alone)
    executor.start(prefill := work(2, "prefill"))
    shared = seconds("decode", 0.5) + beyond(0.5)
    both = slowdown(
        Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, seconds("prefill", 0.5))),
        Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, shared)),
    )
    assert shared * both > alone
    assert executor.next_end() == pytest.approx(0.25 * alone + 0.75 * shared * both)
    executor.advance(executor.next_end())
    assert lease.first == executor.now
    later = slowdown(
        Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, seconds("prefill", 0.5))),
        Beside(0.5, bandwidth_use(SHAPE, 1, 4 * 128, seconds("decode", 0.5))),
    )
    beside = prefill.began + 0.75 * shared * both + 0.5 * seconds("decode", 0.5) * later
    executor.advance(beside)
    assert lease.done == pytest.approx(1.5), "later steps are those of any lease"
    ended = run(executor)
    assert lease.beside == pytest.approx(ended[2] - prefill.began)
    assert lease.busy == pytest.approx(ended[1])
