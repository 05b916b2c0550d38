"""What was learned of jobs, where it says little."""

from __future__ import annotations

from muxserve.scheduler.policy.interface import JobEnded
from muxserve.scheduler.policy.latency import Latency


def test_a_lone_step_takes_some_time_whatever_was_seen() -> None:
    """A model of which nothing was seen is taken to be like another one, and to have no context yet: where
    context is all that counts, a step of it would take no time, and divide others by zero."""
    latency = Latency()
    for context in (1000, 2000, 4000, 8000) * 200:
        seconds = 1e-9 * context**2  # more than linear: without context the line is below zero
        latency.observe(JobEnded("decode", "seen", tokens=16, seconds=seconds, steps=1, context=context))
    assert latency.step("unseen", 1) == 0
    assert latency.lone_step("unseen") >= 1e-5
