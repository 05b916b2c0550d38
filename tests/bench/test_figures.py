"""Statistics, fits, searches and reports, on values made by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxserve.bench.generator import Run
from muxserve.bench.latency import Lone, Slo, Unloaded, fit, grid
from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.report import as_json, describe, outcomes_as_json, report
from muxserve.bench.search import Goodput, Probe, Search, allowed_misses
from muxserve.bench.statistics import Spread, jain, meets, summarize, wilson
from muxserve.bench.workload import Lengths

ALONE = Unloaded(base=0.05, prompt=0.001, output=0.01)
SLO = Slo(8.0, {"a": ALONE, "b": ALONE})


def outcome(
    at: float = 0.0,
    latency: float = 1.0,
    status: Status = Status.OK,
    model: str = "a",
    tenant: str = "",
    tokens: int = 11,
) -> Outcome:
    first = at + latency / 2 if status is Status.OK else None
    return Outcome(at, at, model, tenant, 0, 50, 11, tokens, first, at + latency, status)


def test_latency_counts_from_the_intended_arrival() -> None:
    late = Outcome(1.0, 1.5, "a", "", 0, 4, 3, 3, 2.0, 4.0, Status.OK)
    assert (late.latency, late.ttft, late.tpot) == (3.0, 1.0, 1.0)


def test_there_is_no_time_between_tokens_of_one() -> None:
    assert outcome(tokens=1).tpot is None


def test_an_slo_is_a_multiple_of_the_unloaded_latency() -> None:
    alone = 0.05 + 50 * 0.001 + 10 * 0.01
    assert SLO.seconds("a", 50, 11) == pytest.approx(8 * alone)
    assert meets(outcome(latency=8 * alone - 0.01), SLO, 8)
    assert not meets(outcome(latency=8 * alone + 0.01), SLO, 8)
    assert not meets(outcome(latency=0.1, status=Status.REFUSED), SLO, 8)


def test_a_fit_finds_what_made_the_latencies_and_ignores_slow_repeats() -> None:
    lone = []
    for prompt, output in grid(Lengths(prompt=40, output=30)):
        ttft, latency = ALONE.ttft(prompt), ALONE.latency(prompt, output)
        lone += [Lone(prompt, output, ttft, latency), Lone(prompt, output, ttft * 3, latency * 2)]
    found = fit(lone)
    assert (found.base, found.prompt, found.output) == pytest.approx((0.05, 0.001, 0.01))


def test_a_fit_is_never_negative() -> None:
    found = fit([Lone(10, 5, 0.10, 0.2), Lone(100, 5, 0.05, 0.2)])
    assert found.base > 0 and found.prompt == 0 and found.output > 0


def test_a_summary_tells_refusals_from_failures_and_counts_them_as_missed() -> None:
    outcomes = [
        *(outcome(at=n / 10, latency=0.5) for n in range(6)),
        outcome(at=0.7, latency=30),
        outcome(at=0.8, latency=0.01, status=Status.REFUSED),
        outcome(at=0.9, latency=2, status=Status.LATE),
        outcome(at=0.9, latency=2, status=Status.FAILED),
    ]
    found = summarize(outcomes, 0, 2, SLO)
    assert (found.requests, found.ok, found.refused, found.late, found.failed) == (10, 7, 1, 1, 1)
    assert found.attainment[8] == pytest.approx(0.6)
    assert found.admitted_attainment[8] == pytest.approx(6 / 9)
    assert found.request_rate == pytest.approx(3), "the one that ended after the window is not counted"
    assert found.refusal.p99 == pytest.approx(0.01)
    assert max(found.attainment) == 8


def test_requests_before_the_window_count_where_they_end_in_it() -> None:
    found = summarize([outcome(at=0, latency=5), outcome(at=3, latency=1)], 2, 12, None)
    assert (found.requests, found.attainment) == (1, {})
    assert found.request_rate == pytest.approx(0.2)


def test_nothing_is_not_a_number() -> None:
    assert math.isnan(Spread.of([None]).p99)
    assert as_json(Spread.of([]))["mean"] is None


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_jains_index_lies_between_one_nth_and_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9
    assert jain([values[0]] * len(values)) == pytest.approx(1)


def test_wilsons_interval_holds_the_part_and_narrows() -> None:
    few, many = wilson(99, 100), wilson(9900, 10_000)
    assert few[0] < many[0] < 0.99 < many[1] < few[1]
    assert wilson(0, 0) == (0, 1)


@given(truth=st.floats(0.2, 50), start=st.floats(0.2, 50))
def test_a_search_ends_beside_the_truth(truth: float, start: float) -> None:
    search = Search(start, resolution=1.05, probes=60)
    while (rate := search.next_rate()) is not None:
        search.record(Probe(rate, 100, 0 if rate <= truth else 9, rate <= truth))
    found = search.result
    assert found.below is not None
    assert found.rate <= truth < found.below <= found.rate * 1.05 * (1 + 1e-9)


def test_a_search_ends_after_so_many_probes() -> None:
    search = Search(1.0, probes=3)
    for _ in range(3):
        rate = search.next_rate()
        assert rate is not None
        search.record(Probe(rate, 10, 0, True))
    assert search.next_rate() is None
    assert search.result.below is None


def test_a_pass_above_a_failure_is_luck() -> None:
    search = Search(4.0)
    for rate, passed in ((4.0, True), (6.4, False), (8.0, True)):
        search.record(Probe(rate, 100, 0, passed))
    assert (search.result.rate, search.result.below) == (4.0, 6.4)


def test_fewer_than_a_hundred_requests_may_miss_nothing() -> None:
    assert [allowed_misses(count) for count in (1, 99, 100, 250, 1000)] == [0, 0, 1, 2, 10]


def test_a_goodput_says_how_sure_it_is() -> None:
    found = Goodput(4.0, 5.0, (Probe(4.0, 200, 1, True), Probe(5.0, 250, 3, False)))
    line = describe(found)
    assert "4.00 requests/s (fails at 5.00)" in line and "1 of 200 missed" in line and "interval" in line
    assert "unknown" in describe(Goodput(0.0, None, ()))
    assert "below 2.00" in describe(Goodput(0.0, 2.0, (Probe(2.0, 9, 1, False),)))


def test_a_report_names_the_worst_model_and_survives_json() -> None:
    fine = [outcome(at=n, latency=0.5) for n in range(5)]
    poor = [outcome(at=n, latency=9.0, model="b", tenant="t") for n in range(5)]
    run = Run(tuple(fine + poor), 14.0, 0.7, False)
    found = report(run, 0, 10, SLO)
    assert found.worst_model == "b"
    assert found.models["a"].attainment[8] == 1 and found.models["b"].attainment[8] == 0
    assert set(found.tenants) == {"", "t"}
    assert found.generator_cores == pytest.approx(0.05)
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["total"]["requests"] == 10
    assert outcomes_as_json(run.outcomes)["model"][5] == "b"
