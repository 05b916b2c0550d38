"""What was learned of jobs, where it says little."""

from __future__ import annotations

import random

import pytest

from muxserve.scheduler.policy.interface import JobEnded, ModelSnapshot, Running
from muxserve.scheduler.policy.latency import Latency
from muxserve.scheduler.policy.slip import Slip


def test_a_lone_step_takes_some_time_whatever_was_seen() -> None:
    """A model of which nothing was seen is taken to be like another one, and to have no context yet: where
    context is all that counts, a step of it would take no time, and divide others by zero."""
    latency = Latency()
    for context in (1000, 2000, 4000, 8000) * 200:
        seconds = 1e-9 * context**2  # more than linear: without context the line is below zero
        latency.observe(JobEnded("decode", "seen", tokens=16, seconds=seconds, steps=1, context=context))
    assert latency.step("unseen", 1) == 0
    assert latency.lone_step("unseen") >= 1e-5


def observed(*seconds: tuple[float, float]) -> Latency:
    """One model's step takes `a + b * sequences`, `(a, b)` alone and beside another one."""
    latency = Latency()
    for sequences in list(range(1, 33)) * 10:
        for together, (first, each) in enumerate(seconds):
            latency.observe(
                JobEnded(
                    "decode", "m", sequences, first + each * sequences, steps=1, together=float(together)
                )
            )
    return latency


def test_a_large_batch_decodes_by_itself_where_a_small_one_beside_it_would_not_need_its_core() -> None:
    latency = observed((0.010, 0.0005), (0.012, 0.0013))
    cycle = latency.cycle([("m", 27), ("n", 1)], lanes=2)
    assert cycle.exclusive == {"m", "n"}
    assert cycle.seconds == pytest.approx(0.0235 + 0.0105, rel=0.05), "side by side it would be 0.047"


def test_batches_alike_decode_side_by_side() -> None:
    latency = observed((0.010, 0.0002), (0.012, 0.0003))
    cycle = latency.cycle([(name, 8) for name in "abcd"], lanes=2)
    assert not cycle.exclusive
    assert cycle.seconds == pytest.approx(2 * 0.0144, rel=0.05)


def test_the_largest_decodes_by_itself_and_the_others_side_by_side() -> None:
    latency = observed((0.010, 0.0005), (0.010, 0.0015))
    cycle = latency.cycle([("a", 80), *((name, 1) for name in "bcdefg")], lanes=2)
    assert cycle.exclusive == {"a"}


def test_while_a_prefill_job_runs_there_is_a_lane_less() -> None:
    latency = observed((0.010, 0.0002), (0.012, 0.0003))
    batches = [(name, 8) for name in "abcd"]
    assert latency.busy_cycle(batches, lanes=2) == pytest.approx(4 * 0.0144, rel=0.05)
    assert latency.busy_cycle(batches, lanes=1) > latency.cycle(batches, lanes=1).seconds


def test_a_model_that_has_large_batches_for_long_still_knows_small_ones() -> None:
    """A step that takes as long for one as for a hundred, and then more for each, is no line: what was seen
    of small batches is not to give way to a line through large ones."""
    latency = Latency()

    def decodes(sequences: int) -> None:
        seconds = max(0.013, 0.00013 * sequences)
        latency.observe(JobEnded("decode", "m", 8 * sequences, 8 * seconds, 8, 100 * sequences))

    for sequences in range(1, 101):
        decodes(sequences)
    for round_ in range(2000):
        decodes(150 + round_ * 37 % 101)
    assert latency.step("m", 200) == pytest.approx(0.026, rel=0.15)
    assert 0.004 < latency.lone_step("m") < 0.014, "a line through the large ones alone begins at 0"


def test_what_a_neighbour_costs_is_found_also_where_jobs_are_seldom_alone() -> None:
    """It is assumed to be 0.9 at first; what is expected of a lone job is then as wrong."""
    latency = Latency()
    for number in range(400):
        sequences, beside = 1 + number * 7 % 64, (1.0, 1.0, 0.6, 0.2)[number % 4]
        seconds = (0.010 + 0.0002 * sequences) * (1 + 0.1 * beside)
        latency.observe(JobEnded("decode", "m", 8 * sequences, 8 * seconds, 8, 100 * sequences, beside))
    assert latency.beside("decode") == pytest.approx(1.1, abs=0.05)
    assert latency.lone_step("m") == pytest.approx(0.0102, rel=0.1)


def test_alone_no_step_takes_longer_than_beside_another_one() -> None:
    latency = Latency()
    for _ in range(50):
        latency.observe(JobEnded("decode", "m", 160, 8 * 0.040, 8, 1600))  # on a bad day
    for sequences in list(range(1, 33)) * 10:
        latency.observe(JobEnded("decode", "m", sequences, 0.012 + 0.0005 * sequences, together=1.0))
    assert latency.step("m", 16) <= latency.step("m", 16, True) == pytest.approx(0.020, rel=0.05)


def test_what_was_seen_of_a_lone_sequence_holds_until_it_is_seen_anew() -> None:
    """Whatever is concluded from large batches meanwhile: here, that none takes less than 50 ms."""
    latency = Latency()
    for _ in range(5):
        latency.observe(JobEnded("decode", "m", 8, 8 * 0.013, 8, 100))
    for sequences in list(range(20, 64)) * 10:
        latency.observe(JobEnded("decode", "m", sequences, 0.050 + 1e-5 * sequences))
    assert latency.lone_step("m") == pytest.approx(0.013, rel=0.21)


def test_slip_is_how_much_longer_a_model_took_than_was_expected() -> None:
    slip, running = Slip(), ModelSnapshot("m", 16, 2, 8, None, running=(Running(1, 0.0, 10, 99, 1),))
    for window in range(20):
        slip.look([running], float(window), lambda: 0.05)
        slip.stepped("m", 10)
    assert slip.of("m") == pytest.approx(2.0, rel=0.01), "ten steps a second, twenty expected"
    assert slip.of("n") == 1.0
    idle = ModelSnapshot("m", 16, 2, 8, None)
    slip.look([idle], 20.0, lambda: 0.05)
    assert slip.of("m") == pytest.approx(1.5, rel=0.01), "who made it wait is gone by and by"
    slip.look([idle], 1000.0, lambda: 0.05)
    slip.look([running], 1001.0, lambda: 0.05)
    assert slip.of("m") == 1.0, "nothing was expected while nothing ran"


def test_short_prompts_tell_nothing_of_what_a_long_one_attends_to() -> None:
    """Whatever curve noise bends short ones to: a long one's tokens take as long as those of the longest."""
    latency = Latency()
    for tokens in list(range(5, 41)) * 6:
        latency.observe(JobEnded("prefill", "m", tokens, seconds=0.004 + 0.001 * tokens + 2e-5 * tokens**2))
    assert latency.prefill("m", 40) == pytest.approx(0.076, rel=0.2)
    assert latency.prefill("m", 3000) < 3000 / 40 * 0.076

    for _ in range(16):  # and once there are long ones, none is expected to take much more than they do
        latency.observe(JobEnded("prefill", "m", 3000, seconds=12.0))
        assert latency.prefill("m", 3000) < 15
    assert latency.prefill("m", 3000) == pytest.approx(12.0, rel=0.1)


def test_models_that_take_the_same_are_taken_to_take_the_same_though_none_was_ever_alone() -> None:
    order, latency = random.Random(1), Latency()
    usual = {"hot": 30, "warm": 12, "cool": 7, "cold": 4}
    for _ in range(400):
        for name, count in usual.items():
            sequences = max(1, round(order.gauss(count, count / 6)))
            step = (0.007 + 0.0004 * sequences) * 1.4 * order.gauss(1.0, 0.15)
            latency.observe(
                JobEnded("decode", name, 8 * sequences, 8 * step, 8, 40 * sequences, together=order.random())
            )
    steps = [latency.lone_step(name) for name in usual]
    assert max(steps) < 1.25 * min(steps)
    assert all(0.5 * 0.0074 < step < 1.5 * 0.0074 for step in steps)


def test_a_model_twice_as_large_is_taken_to_take_longer() -> None:
    order, latency = random.Random(2), Latency()
    for _ in range(300):
        for name, count, size in (("small", 20, 1.0), ("large", 5, 2.0)):
            sequences = max(1, round(order.gauss(count, count / 5)))
            step = size * (0.007 + 0.0004 * sequences) * order.gauss(1.0, 0.1)
            latency.observe(
                JobEnded("decode", name, 8 * sequences, 8 * step, 8, 40 * sequences, together=1.0)
            )
    # Batches have no size in common: whether it is the model or the batch can hardly be told.
    assert 1.25 < latency.lone_step("large") / latency.lone_step("small") < 2.5
