"""Short prompts wait for others of their model where these come often, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muxserve.scheduler.policy.company import LEASE_PATIENCE, PATIENCE, Company
from muxserve.scheduler.policy.interface import JobEnded, ModelSnapshot, Waiting
from muxserve.scheduler.policy.latency import Latency

PACE = 0.05
"""Seconds between two tokens of what decodes."""
OFTEN, SELDOM = 0.02, 1.0


def model(*waiting: Waiting, ttft: float = 0.0) -> ModelSnapshot:
    return ModelSnapshot("m", 16, 4, 8, 100, tuple(waiting), (), 0, ttft_target=ttft)


def prompt(number: int, arrival: float, tokens: int = 10, *, emitted: bool = False) -> Waiting:
    return Waiting(number, arrival, tokens, limit=tokens + 10, emitted=emitted)


def company(between: float) -> tuple[Company, float]:
    """One that has seen a prompt every so many seconds, and when the latest came."""
    latency = Latency()
    for _ in range(20):  # 20 ms, and half a millisecond for each token
        for tokens in (1, 10, 200):
            latency.observe(JobEnded("prefill", "m", tokens, 0.02 + 0.0005 * tokens))
    made, now = Company(latency), 0.0
    for number in range(30):
        now = number * between
        made.look([model(prompt(number, now))])
    return made, now


def test_a_short_prompt_waits_for_another_one_a_token_and_a_half() -> None:
    made, now = company(OFTEN)
    waiting = [prompt(99, now), prompt(100, now + 0.01)]
    assert made.until(model(*waiting), waiting, PACE) == pytest.approx(now + PATIENCE * PACE)


def test_where_none_is_likely_to_come_it_does_not_wait() -> None:
    made, now = company(SELDOM)
    assert made.until(model(prompt(99, now)), [prompt(99, now)], PACE) <= now
    unseen = Company(Latency())
    assert unseen.until(model(prompt(1, 0.0)), [prompt(1, 0.0)], PACE) <= 0.0


def test_a_job_that_is_large_enough_does_not_wait() -> None:
    made, now = company(OFTEN)
    waiting = [prompt(number, now, tokens=50) for number in (99, 100)]
    assert made.until(model(*waiting), waiting, PACE) <= now


def test_a_stream_that_goes_on_and_a_target_do_not_wait() -> None:
    made, now = company(OFTEN)
    again = [prompt(99, now, emitted=True)]
    assert made.until(model(*again), again, PACE) <= now
    aimed = [prompt(99, now)]
    assert made.until(model(*aimed, ttft=0.1), aimed, PACE) <= now


def test_what_came_back_says_nothing_of_how_often_prompts_come() -> None:
    made, now = company(SELDOM)
    for number in range(50):
        made.look([model(prompt(number, now - 5 + 0.001 * number))])
    assert made.until(model(prompt(99, now)), [prompt(99, now)], PACE) <= now


def test_where_its_model_decodes_a_short_prompt_waits_for_a_lease_a_long_one_does_not() -> None:
    made, now = company(SELDOM)
    short, long = prompt(99, now), prompt(100, now, tokens=65)
    lone = model(short, long)
    assert made.lease_until(lone, short, PACE, room=64) == pytest.approx(now + LEASE_PATIENCE * PACE)
    assert made.lease_until(lone, long, PACE, room=64) == 0.0
    half = replace(long, computed=1)
    assert made.lease_until(lone, half, PACE, room=64) > now, "what is left of it counts"
    assert made.lease_until(lone, prompt(101, now, emitted=True), PACE, room=64) == 0.0
    assert made.lease_until(model(short, ttft=0.5), short, PACE, room=64) == 0.0
