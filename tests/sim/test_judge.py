"""What chooses among placements: a simulation of each, within its time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muxserve.sim.arrivals import poisson
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.sim.judge import judge, merit
from muxserve.sim.report import report
from tests.placement.solver.inputs import COSTS
from tests.sim.inputs import together, two_models


def test_the_placement_that_serves_more_is_better() -> None:
    work = two_models(20.0)
    crowded, roomy = together(work, 0), together(work, 0, 1)
    scores = judge([crowded, roomy], work, COSTS, seconds=60)
    assert scores[0] < scores[1]


def test_placements_that_time_does_not_suffice_for_lose_to_the_first() -> None:
    work = two_models()
    assert judge([together(work, 0)] * 2, work, COSTS, seconds=-1) == [0.0, float("-inf")]


def test_a_model_that_starves_costs_more_than_a_little_service_of_others() -> None:
    """And the more it is served, the less it costs."""
    work = two_models()
    found = report(
        simulate(together(work, 0), work, COSTS, poisson(work, 20, 1), 20, SimOptions()),
        together(work, 0),
        work,
        COSTS,
    )

    def served(part: float) -> float:
        cold = replace(found.models["cold"], throughput=part * found.models["cold"].rate)
        return merit(replace(found, models={**found.models, "cold": cold}))

    assert served(1.0) == pytest.approx(served(0.5))
    assert served(0.5) - served(0.49) > 0.5
    assert served(0.49) - served(0.0) == pytest.approx(0.49, abs=0.01)
