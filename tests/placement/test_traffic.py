"""Rates and lengths from counters."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from muxserve.placement.traffic import CALM, PATIENCE, Lengths, Traffic, deviation


class Arrivals:
    """Poisson arrivals at a rate that changes, counted once a second."""

    def __init__(self, seed: int, expected: dict[str, float] | None = None) -> None:
        self.traffic = Traffic(expected)
        self.now = 0.0
        self._random = random.Random(seed)
        self._total = 0
        self.traffic.arrivals("m", 0.0, 0)

    def go_on(self, seconds: int, rate: float) -> list[bool]:
        """Whether there was a burst after each second."""
        bursts = []
        for _ in range(seconds):
            self.now += 1.0
            at = self._random.expovariate(rate) if rate else 2.0
            while at < 1.0:
                self._total += 1
                at += self._random.expovariate(rate)
            self.traffic.arrivals("m", self.now, self._total)
            bursts.append(self.traffic.flow("m").burst)
        return bursts

    @property
    def rate(self) -> float:
        return self.traffic.flow("m").rate


@pytest.mark.parametrize("rate", [0.05, 0.5, 5.0, 50.0])
def test_steady_arrivals_give_their_rate_and_hardly_ever_a_burst(rate: float) -> None:
    alarms, seconds, errors = 0, 600, []
    for seed in range(10):
        arrivals = Arrivals(seed)
        bursts = arrivals.go_on(seconds, rate)
        alarms += sum(1 for one, other in pairwise(bursts) if other and not one)
        errors.append(arrivals.rate - rate)
    assert alarms <= 4
    # 180 s of events are in each estimate, ten of them in the mean.
    assert abs(sum(errors) / len(errors)) < 4 * (rate / 1800) ** 0.5


@pytest.mark.parametrize(("before", "after"), [(8.0, 1.0), (1.0, 8.0), (0.0, 4.0), (4.0, 0.0)])
def test_a_change_that_lasts_is_the_rate_within_twenty_seconds(before: float, after: float) -> None:
    for seed in range(10):
        arrivals = Arrivals(seed)
        arrivals.go_on(300, before)
        assert any(arrivals.go_on(20, after)), "noticed as a burst first"
        assert arrivals.rate == pytest.approx(after, abs=0.35 * max(before, after))


def test_a_burst_that_ends_leaves_the_rate_as_it_was() -> None:
    for seed in range(10):
        arrivals = Arrivals(seed)
        arrivals.go_on(300, 2.0)
        before = arrivals.rate
        assert any(arrivals.go_on(int(PATIENCE) - 3, 12.0))
        arrivals.go_on(60, 2.0)
        assert not arrivals.traffic.flow("m").burst
        assert arrivals.rate == pytest.approx(before, abs=0.8)


def test_seconds_in_which_nothing_comes_do_not_say_that_nothing_will_come() -> None:
    for seed in range(10):
        arrivals = Arrivals(seed)
        arrivals.go_on(300, 4.0)
        arrivals.go_on(11, 0.0)
        assert arrivals.rate > 0.02
        arrivals.go_on(300, 0.0)
        assert arrivals.rate < 0.01


def regular(traffic: Traffic, begin: int, end: int, rates: dict[str, tuple[float, float]]) -> None:
    """Every second from `begin` to `end`; rates before and from the hundredth second on."""
    for second in range(begin, end + 1):
        for name, (before, after) in rates.items():
            total = before * min(second, 100) + after * max(0, second - 100)
            traffic.arrivals(name, float(second), int(total))


def test_where_popularity_changes_a_slight_change_is_noticed_sooner() -> None:
    """One half that becomes one and a half is no burst yet; beside a flip it is believed."""
    alone, beside = Traffic(), Traffic()
    regular(alone, 0, 115, {"m": (0.5, 1.5)})
    regular(beside, 0, 115, {"hot": (10.0, 1.0), "m": (0.5, 1.5), "n": (1.0, 1.0)})
    assert alone.flow("m").rate < 0.75
    assert beside.flow("m").rate > 0.95
    assert beside.flow("hot").rate == pytest.approx(1.0, abs=0.2)
    assert beside.flow("n").rate == pytest.approx(1.0, abs=0.1)


def test_who_believes_bursts_knows_of_a_flip_before_it_has_lasted() -> None:
    traffic = Traffic()
    regular(traffic, 0, 107, {"hot": (10.0, 1.0), "cold": (1.0, 10.0)})
    assert traffic.flow("hot").rate > 7
    assert traffic.flow("cold").rate < 3
    believing = traffic.believing()
    assert believing.flow("hot").rate < 3
    assert believing.flow("cold").rate > 7
    assert not believing.flow("hot").burst
    assert traffic.flow("hot").burst, "what is known otherwise stays as it is"


def test_a_small_model_that_changes_says_nothing_of_the_others() -> None:
    alone, beside = Traffic(), Traffic()
    regular(alone, 0, 115, {"m": (0.5, 1.5)})
    regular(beside, 0, 115, {"m": (0.5, 1.5), "small": (2.0, 0.0), "large": (40.0, 40.0)})
    assert beside.flow("small").rate < 0.2
    assert beside.flow("m").rate == alone.flow("m").rate


def test_a_stated_rate_counts_until_traffic_says_otherwise() -> None:
    arrivals = Arrivals(1, {"m": 5.0})
    assert arrivals.rate == 5.0
    arrivals.go_on(60, 0.0)
    assert arrivals.rate < 0.5
    assert Traffic({"n": 3.0}).flow("n").rate == 3.0, "even before it was ever looked at"


def test_a_counter_that_begins_again_is_no_traffic() -> None:
    traffic = Traffic()
    for now, total in ((0.0, 1000), (1.0, 1004), (2.0, 3), (3.0, 7)):
        traffic.arrivals("m", now, total)
    assert traffic.flow("m").rate == pytest.approx(4.0, rel=0.01)
    traffic.arrivals("m", 3.0, 9)  # no time has passed: nothing can be said
    assert traffic.flow("m").rate == pytest.approx(4.0, rel=0.01)


def test_lengths_are_means_of_finished_requests_over_all_sources() -> None:
    traffic = Traffic()
    assert traffic.flow("m").output_tokens == 128
    for second in range(1, 101):
        traffic.lengths("m", "a", float(second), Lengths(second, 100 * second, 20 * second))
        traffic.lengths("m", "b", float(second), Lengths(second, 200 * second, 40 * second))
    flow = traffic.flow("m")
    assert flow.prompt_tokens == pytest.approx(150, rel=0.03)
    assert flow.output_tokens == pytest.approx(30, rel=0.05)
    traffic.lengths("m", "a", 101.0, Lengths(1, 100, 20))  # that scheduler was started again
    assert traffic.flow("m").prompt_tokens == pytest.approx(150, rel=0.03)


def test_chance_explains_little_of_much_and_much_of_little() -> None:
    assert abs(deviation(0.25, 0.05, 12)) < CALM, "three where one half was to be expected"
    assert deviation(10.0, 5.0, 12) > 5, "a hundred and twenty where it was sixty"
    assert deviation(0.0, 5.0, 12) < -10
