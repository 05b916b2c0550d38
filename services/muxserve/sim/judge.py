"""`judge`: how good placements are, by simulating them, several at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import Placement
from muxserve.placement.solver.workload import Workload
from muxserve.sim.arrivals import poisson
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.sim.report import SLO_SCALE, Report, report

DURATION = 60.0
"""Seconds of arrivals."""
SEED = 7
LEAST_SERVED = 0.5
"""Part of its rate of which a model that is served less starves."""
STARVING = 0.5
"""What it costs that a model starves at all, in parts of all requests; as much again if it gets nothing."""


class _OutOfTime(Exception):
    pass


def merit(result: Report) -> float:
    """Part of the requests that is served, and that is served in time; less where a model starves."""
    total, least = result.total, result.least_served
    starving = STARVING * (2 - least / LEAST_SERVED) if least < LEAST_SERVED else 0.0
    return total.served + total.attainment[str(SLO_SCALE)] - starving


def judge(
    placements: Sequence[Placement],
    workload: Workload,
    costs: CostModel,
    seconds: float,
    processes: int = 2,
    policy: str = "adbs",
) -> list[float]:
    """`merit` of each. Those that are not done after `seconds` get minus infinity; if that is all of them,
    the first one gets 0."""
    deadline = time.time() + seconds
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(_judge_one, placement, workload, costs, deadline, policy) for placement in placements
        ]
        scores = [_score(future) for future in running]
    if scores and max(scores) == float("-inf"):
        scores[0] = 0.0
    return scores


def _score(future: Future[float]) -> float:
    try:
        return future.result()
    except _OutOfTime:
        return float("-inf")


def _judge_one(
    placement: Placement, workload: Workload, costs: CostModel, deadline: float, policy: str
) -> float:
    def check(done: float) -> None:
        if time.time() > deadline:
            raise _OutOfTime

    check(0.0)
    # What a placement leaves behind after its last arrival says nothing new about it.
    options = SimOptions(policy=policy, patience=20.0)
    arrivals = poisson(workload, DURATION, SEED)
    outcome = simulate(placement, workload, costs, arrivals, DURATION, options, check)
    return merit(report(outcome, placement, workload, costs))
