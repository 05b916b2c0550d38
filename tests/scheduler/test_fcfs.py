"""What the baseline decides."""

from __future__ import annotations

from muxserve.scheduler.policy import create
from muxserve.scheduler.policy.interface import DecodeJob, PolicyOptions, Preempt, PrefillJob
from tests.scheduler.world import Shape, World


def world(blocks: int) -> World:
    return World(create("fcfs", PolicyOptions()), blocks, {"a": Shape(4, 1, 8), "b": Shape(4, 1, 8)})


def test_the_oldest_request_of_any_model_comes_first_and_nobody_passes_it() -> None:
    unit = world(30)
    for model, prompt in (("b", 60), ("a", 100), ("b", 4)):
        unit.add(model, prompt, 5)
        unit.now += 1
    (first,) = unit.decide()
    assert isinstance(first, PrefillJob) and first.model == "b"
    assert [chunk.sequence for chunk in first.chunks] == [1, 3], (
        "in one job with the next of its model that fits"
    )
    unit.advance(unit.jobs[1])
    assert not any(isinstance(d, PrefillJob) for d in unit.decide()), "a's head does not fit yet"


def test_the_newest_gives_way() -> None:
    unit = world(8)
    for model in "ab":
        request = unit.add(model, 16, 50)
        request.emitted, request.computed, request.open, request.groups = 1, 16, True, 4
        unit.now += 1
    decisions = unit.decide()
    assert Preempt(2) in decisions
    assert [d.sequences for d in decisions if isinstance(d, DecodeJob)] == [(1,)]
