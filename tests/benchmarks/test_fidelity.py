"""What profiles of several rounds say together, and runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fidelity.comparing import compare, mean
from muxserve.bench.outcomes import Outcome, Status


def profile(milliseconds: float) -> dict[str, Any]:
    cell = {"prefill": 2 * milliseconds, "decoding": milliseconds, "together": -1}
    return {"$service": {"order_seconds": milliseconds / 1e3, "slots": 64}, "m0": {"1": {"8": cell}}}


def test_times_are_averaged_and_counts_and_what_was_not_measured_are_not() -> None:
    assert mean([profile(10.0), profile(20.0), profile(60.0)]) == profile(30.0)


def test_what_only_one_profile_has_is_that_ones() -> None:
    other = profile(20.0)
    other["m0"]["1"]["8"]["together"] = 30.0
    cell = mean([profile(10.0), other])["m0"]["1"]["8"]
    assert cell == {"prefill": 30.0, "decoding": 15.0, "together": 30.0}


def answered(at: float, ttft: float, tpot: float) -> Outcome:
    end = at + ttft + 10 * tpot
    return Outcome(at, at, "m0", "", 0, 5, 11, 11, at + ttft, end, Status.OK)


def test_the_requests_of_all_rounds_count_together_without_those_of_the_warm_up() -> None:
    real = [[answered(1.0, 9.0, 9.0), answered(4.0, 0.1, 0.01)], [answered(5.0, 0.3, 0.03)]]
    simulated = [[answered(1.0, 1.0, 1.0), answered(4.0, 0.1, 0.01)], [answered(5.0, 0.1, 0.01)]]
    found = compare(0.5, 1.0, real, simulated, (2.0, 10.0)).all
    assert (found.service.requests, found.simulated.requests) == (2, 2)
    assert found.service.ttft == pytest.approx(0.2) and found.simulated.ttft == pytest.approx(0.1)
    assert found.tpot_error == pytest.approx(-0.5) and not found.holds
    assert found.service.throughput == pytest.approx(2 / 16)
