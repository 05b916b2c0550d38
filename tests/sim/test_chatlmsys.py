"""The paper's real workload on its measured table, where these files lie beside the checkout."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from muxserve.cli.place import compute, read_inputs
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import Placement
from muxserve.placement.solver.workload import Workload
from muxserve.sim.arrivals import poisson
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.sim.report import Report, report

DATA = Path(__file__).parents[3] / "shared" / "data"
WORKLOAD, COST = DATA / "chatlmsys_1200.yaml", DATA / "a100_cost.json"

pytestmark = [
    pytest.mark.skipif(not (WORKLOAD.exists() and COST.exists()), reason="needs ../shared/data"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def inputs() -> tuple[Workload, CostModel]:
    return read_inputs(WORKLOAD, COST)


def simulated(placement: Placement, inputs: tuple[Workload, CostModel], duration: float) -> Report:
    arrivals = poisson(inputs[0], duration, seed=11)
    outcome = simulate(placement, *inputs, arrivals, duration, SimOptions(policy="adbs"))
    return report(outcome, placement, *inputs)


def test_every_cell_of_the_table_is_read_and_what_is_missing_is_filled(
    inputs: tuple[Workload, CostModel],
) -> None:
    costs = inputs[1]
    assert costs.decode("llama-7b", 1, 1.0, 1, 32) == pytest.approx(0.01126, rel=0.01)
    assert costs.prefill("llama-65b", 8, 0.3, 2048, 512) > costs.prefill("llama-65b", 8, 0.3, 64, 512)


@pytest.mark.slow
def test_best_serves_more_than_the_paper_in_time_and_starves_nobody(
    inputs: tuple[Workload, CostModel],
) -> None:
    began = time.monotonic()
    paper = compute(*inputs, "paper", 60)
    assert time.monotonic() - began < 60
    began = time.monotonic()
    best = compute(*inputs, "best", 90)
    assert time.monotonic() - began < 120
    reports = {
        name: simulated(placement, inputs, 150)
        for name, placement in {
            "paper": paper,
            "best": best,
            "spatial": compute(*inputs, "spatial", 60),
        }.items()
    }
    assert reports["best"].total.throughput >= 1.15 * reports["paper"].total.throughput
    assert reports["best"].total.attainment["8"] >= reports["spatial"].total.attainment["8"]
    assert reports["best"].least_served >= 0.5


@pytest.mark.slow
def test_ten_minutes_of_a_cluster_are_simulated_in_one(inputs: tuple[Workload, CostModel]) -> None:
    placement = compute(*inputs, "spatial", 60)
    began = time.process_time()
    assert simulated(placement, inputs, 600).total.requests > 60_000
    assert time.process_time() - began < 60
