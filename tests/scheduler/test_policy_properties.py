"""Whatever the load, a policy keeps the books and brings every request to its end."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from muxserve.scheduler.policy import POLICIES, create
from muxserve.scheduler.policy.interface import PolicyOptions, PrefillJob
from tests.scheduler.world import Shape, World

OPTIONS = PolicyOptions(chunk_tokens=24, chunk_seconds=10, lease_steps=4, adapt_seconds=3)

shapes = st.builds(
    Shape, st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 1.0, 9.0])
)
loads = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 30), st.integers(0, 40)),
    min_size=1,
    max_size=14,
)
worlds = st.tuples(
    st.sampled_from(sorted(POLICIES)),
    st.lists(shapes, min_size=1, max_size=3),
    loads,
    st.floats(1.0, 4.0),
    st.integers(0, 2**32),
)

REGROUPED = (
    "adbs",
    [Shape(2, 3, 2), Shape(2, 3, 2, 9.0)],
    [
        *((0, 2, 18, 18), (0, 27, 23, 0), (1, 39, 4, 0), (1, 4, 9, 32), (0, 32, 6, 25), (0, 2, 18, 18)),
        *((0, 2, 18, 18), (0, 40, 3, 24), (0, 40, 3, 24), (0, 31, 4, 16), (1, 7, 2, 30)),
    ],
    2.460418902460491,
    24157,
)
"""Two leases that each ended the other one before it did a step."""

PASSED_OVER = (
    "round_robin",
    [Shape(1, 1, 1), Shape(7, 4, 1), Shape(8, 4, 1)],
    [(0, 1, 1, 1), (0, 1, 30, 0), (0, 7, 11, 1), (1, 1, 7, 2), (1, 8, 19, 2), (2, 18, 16, 2)],
    1.0,
    0,
)
"""A model that was passed over often enough, while a prompt of another one was half computed."""

GAVE_WAY = (
    "mux",
    [Shape(1, 1, 2, 0.0), Shape(1, 1, 1, 0.0), Shape(1, 1, 1, 0.0)],
    [(0, 1, 1, 0), (0, 1, 1, 0), (0, 1, 9, 0), (0, 9, 13, 0), (1, 25, 1, 1), (2, 25, 5, 0)],
    2.0,
    0,
)
"""A prompt that was half computed gives way to one that does not begin after all, and its own turn comes."""

LAST_TOKEN = (
    "adbs",
    [Shape(4, 1, 2), Shape(1, 1, 1)],
    [(0, 1, 1, 0), (0, 1, 24, 1), (0, 23, 18, 3)],
    3.0,
    1,
)
"""A sequence that is recomputed, whose last token alone is left for the job that follows its first chunk."""


def run(
    name: str, shape_list: list[Shape], load: list[tuple[int, int, int, int]], room: float, seed: int
) -> World:
    """Play a load in random order of events until all is done; asserts that it ends."""
    shapes = {f"m{index}": shape for index, shape in enumerate(shape_list)}
    joins = seed // 2 % 2 > 0
    tick = 0.01 if joins else 1.0  # some hundredths are what prompts wait for a lease
    due = sorted((at * tick, f"m{which % len(shapes)}", prompt, output) for which, prompt, output, at in load)
    largest = max(
        -(-(prompt + output) // shapes[model].tokens_per_block) * shapes[model].blocks_per_span
        for _, model, prompt, output in due
    )
    # How many decode jobs may run side by side is of no consequence to any of this, nor what they may have.
    world = World(create(name, OPTIONS), int(largest * room), shapes, decode_lanes=1 + seed % 2, joins=joins)
    order = random.Random(seed)
    budget = 40 * sum(prompt + output for _, _, prompt, output in due) * len(due) + 200
    while due or world.requests:
        while due and due[0][0] <= world.now:
            world.add(*due.pop(0)[1:])
        world.decide()
        pauses = world.ask_at < math.inf
        assert world.jobs or pauses or not world.requests, "with work to do, something runs"
        assert not pauses or name == "spatial" or world.jobs, "only parts that are fixed are left unused"
        if world.jobs:
            job = world.jobs[order.choice(sorted(world.jobs))]
            if isinstance(job.what, PrefillJob) and not job.nearing and order.random() < 0.5:
                job.nearing = True
            else:
                world.advance(job)
            world.check()
            world.now += tick
        else:
            world.now = min(world.ask_at, due[0][0] if due else world.now + 1)
        budget -= 1
        assert budget > 0, "livelock"
    assert world.available == world.total
    return world


@settings(max_examples=400, deadline=None)
@given(worlds)
@example(REGROUPED)
@example(PASSED_OVER)
@example(GAVE_WAY)
@example(LAST_TOKEN)
def test_every_request_finishes_and_blocks_never_exceed_the_pool(case: tuple[Any, ...]) -> None:
    world = run(*case)
    assert len(world.finished) + len(world.refused) == len(case[2])
    assert not world.refused or case[0] == "spatial", "it alone has requests that never fit"


@settings(max_examples=30, deadline=None)
@given(worlds)
def test_the_same_events_lead_to_the_same_decisions(case: tuple[Any, ...]) -> None:
    assert run(*case).log == run(*case).log


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_endless_flood_of_one_model_does_not_starve_another(name: str) -> None:
    world = World(create(name, OPTIONS), 60, {"cold": Shape(4, 2, 4), "hot": Shape(4, 2, 16)})
    order = random.Random(1)
    cold = None
    for step in range(3000):
        while sum(r.model == "hot" for r in world.requests.values()) < 24:
            world.add("hot", 10, 20)
        if step == 100:
            # Three quarters of the arena, and more than its quota; a fixed part would not hold that.
            cold = world.add("cold", 25 if name == "spatial" else 60, 30)
        world.decide()
        if world.jobs:
            world.advance(world.jobs[order.choice(sorted(world.jobs))])
        world.now = world.now + 0.1 if world.jobs else max(world.now + 0.1, min(world.ask_at, world.now + 1))
        if cold is not None and cold.done:
            return
    pytest.fail("the cold model's request never finished")
