"""What is loaded where, on machines that are there: worth goes down with load bit by bit."""

from __future__ import annotations

from itertools import pairwise

import pytest

from muxserve.placement.advisor import Options
from muxserve.placement.solver.capacity import CERTAIN, Estimator, value
from muxserve.placement.solver.fixed import OBSERVED, FixedObjective, Machine
from muxserve.placement.solver.machines import Footprint, MachineCosts, ceilings
from muxserve.placement.solver.workload import Model

SHAPE = Footprint.of(270 * 2**20, 23040, 30)
SHARES = (0.69, 0.16, 0.07, 0.04, 0.024, 0.016)
"""Of requests: popularity by alpha = 2.1."""


def objective(rate: float) -> FixedObjective:
    """Two workers of one core, six models of that popularity."""
    names = [f"m{i}" for i in range(len(SHARES))]
    device = ceilings("cpu", 1)
    estimator = Estimator(MachineCosts(dict.fromkeys(names, SHAPE), device, 0.3, 0.45), device.bandwidth)
    machines = [Machine(name, 3.5 * SHAPE.weights, 256 * 2**20, estimator) for name in "ab"]
    models = [Model(n, n, rate * share, 17, 33, SHAPE) for n, share in zip(names, SHARES, strict=True)]
    return FixedObjective(machines, models, [[SHAPE.weights] * 2] * len(models), 120.0)


def beside(*others: int) -> tuple[frozenset[int], frozenset[int]]:
    """The most popular model with these, and the rest."""
    with_first = frozenset({0, *others})
    return with_first, frozenset(range(len(SHARES))) - with_first


APART, BY_TURNS, TOGETHER = beside(4, 5), beside(2, 4), beside(1, 2)


@pytest.mark.parametrize("rate", [12.0, 14.0, 16.0, 18.0, 20.0])
def test_less_beside_the_most_popular_model_is_worth_more_at_every_load(rate: float) -> None:
    found = objective(rate)
    scores = [found.score(state) for state in (APART, BY_TURNS, TOGETHER)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[2] > Options().least * found.perfect, "and so much that it is done"


def test_worth_goes_down_with_load_step_by_step() -> None:
    rates = [8 + 0.25 * step for step in range(60)]
    worth = [objective(rate).worth(APART)[0] for rate in rates]
    assert worth[0] > 0.95
    assert worth[-1] < 0.75
    assert all(0 <= one - other < 0.08 for one, other in pairwise(worth) if one > 0.7)


def test_the_forecast_of_a_machine_is_of_what_is_loaded_there() -> None:
    found = objective(14.0)
    first, second = found.forecasts(APART)
    assert first.headroom < second.headroom
    assert found.forecasts(beside())[0].headroom > first.headroom
    assert found.ratio(0, first.turn) == pytest.approx(33 * first.turn / (33 * 0.0085), rel=0.3)


def test_whatever_is_expected_has_a_worth() -> None:
    for tolerance in (CERTAIN, OBSERVED):
        assert value(0.0, 1.0, tolerance) == 0.0
        assert value(4.0, 1.0, tolerance) == pytest.approx(1.0, abs=0.05)
        assert 0.0 < value(1e-6, 1e6, tolerance) < 0.01
