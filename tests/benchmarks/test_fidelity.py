"""Profiles of a machine that is not as fast for minutes on end."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fidelity.__main__ import Measured
from benchmarks.fidelity.comparing import mean, scaled
from muxserve.v1 import common_pb2


def profile(milliseconds: float) -> dict[str, Any]:
    cell = {"prefill": 2 * milliseconds, "decoding": milliseconds, "together": -1}
    return {"$service": {"order_seconds": milliseconds / 1e3, "slots": 64}, "m0": {"1": {"8": cell}}}


def test_times_are_scaled_and_counts_and_what_was_not_measured_are_not() -> None:
    assert scaled(profile(10.0), 1.5) == profile(15.0)


def test_what_only_one_profile_has_is_that_ones() -> None:
    other = profile(20.0)
    other["m0"]["1"]["8"]["together"] = 30.0
    assert mean(profile(10.0), other)["m0"]["1"]["8"] == {"prefill": 30.0, "decoding": 15.0, "together": 30.0}


def test_each_load_is_simulated_at_the_pace_that_the_machine_had() -> None:
    # 10 ms a step where a burst takes 2 s; half as fast from the second load on.
    paces = [2.0, 2.0, 2.0, 4.0, 4.0, 4.0]
    measured = Measured((profile(10.0), profile(20.0)), common_pb2.ModelShape(), {}, paces)
    steps = [measured.table(load)["m0"]["1"]["8"]["decoding"] for load in range(3)]
    assert steps == pytest.approx([10.0, 15.0, 20.0])
