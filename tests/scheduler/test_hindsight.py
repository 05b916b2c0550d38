"""Estimates are read as earlier ones came true."""

from __future__ import annotations

import random

import pytest

from muxserve.scheduler.policy.hindsight import Hindsight


def test_at_first_estimates_are_taken_as_they_are() -> None:
    hindsight = Hindsight()
    assert [hindsight(each) for each in (1.0, 4.0, 20.0)] == [1.0, 4.0, 20.0]


def test_crowded_moments_that_pass_are_found_out() -> None:
    hindsight, source = Hindsight(), random.Random(1)
    for _ in range(300):
        crowd = source.uniform(2, 10)
        hindsight.observe(crowd, 3 + 0.4 * crowd + source.gauss(0, 0.5))
    assert hindsight(9.0) == pytest.approx(6.6, rel=0.1)
    assert hindsight(3.0) == pytest.approx(4.2, rel=0.1)


def test_outcomes_that_are_all_alike_shift_the_line_and_do_not_turn_it() -> None:
    hindsight = Hindsight()
    for _ in range(300):
        hindsight.observe(4.0, 5.0)
    assert hindsight(4.0) == pytest.approx(5.0, rel=0.05)
    assert hindsight(8.0) == pytest.approx(9.0, rel=0.1)


def test_nothing_takes_less_than_alone_and_a_stall_does_not_count_for_more_than_a_crowd() -> None:
    hindsight = Hindsight()
    for _ in range(300):
        hindsight.observe(6.0, 0.5)
    assert hindsight(1.0) == 1.0
    stalled = Hindsight()
    stalled.observe(4.0, 1e6)
    assert stalled(4.0) < 8.0


def test_a_crowd_larger_than_any_seen_is_not_expected_to_pass() -> None:
    hindsight, source = Hindsight(), random.Random(1)
    for _ in range(300):
        crowd = source.uniform(1, 4)
        hindsight.observe(crowd, 1.5 + 0.5 * crowd)
    assert hindsight(12.0) == pytest.approx(hindsight(4.0) + 8.0, rel=0.01)
