"""How fast workers are, from what schedulers count."""

from __future__ import annotations

import pytest

from muxserve.placement.advisor_speeds import CONTEXT, Speeds
from muxserve.placement.solver.machines import Footprint, MachineCosts, ceilings
from muxserve.v1 import scheduler_pb2

MODEL = Footprint.of(270 * 2**20, 23040, 30)
COSTS = MachineCosts({"m": MODEL}, ceilings("cpu", 1))


def counted(jobs: int, steps: int, slower: float, batch: int = 4) -> scheduler_pb2.UnitModelStatus:
    """Prefills of 32 tokens and decode steps that took `slower` times what is predicted."""
    return scheduler_pb2.UnitModelStatus(
        model="m",
        prefill_jobs=jobs,
        prefill_job_tokens=32 * jobs,
        prefill_seconds=slower * jobs * COSTS.prefill("m", 1, 1.0, 1, 32),
        decode_steps=steps,
        decode_step_tokens=steps * batch,
        decode_seconds=slower * steps * COSTS.decode("m", 1, 1.0, batch, CONTEXT),
    )


def observe(speeds: Speeds, status: scheduler_pb2.UnitModelStatus, source: str = "s") -> None:
    speeds.observe("w", "cpu", 1, MODEL, source, status)


def test_factors_are_what_jobs_took_over_what_they_should_have_taken() -> None:
    speeds = Speeds()
    assert speeds.factors("w") == (1.0, 1.0)
    for n in range(1, 20):
        observe(speeds, counted(20 * n, 100 * n, 2.5))
    assert speeds.factors("w") == pytest.approx((2.5, 2.5), rel=0.02)


def test_newer_times_count_more_and_a_scheduler_may_begin_again() -> None:
    speeds = Speeds()
    for n in range(1, 10):
        observe(speeds, counted(50 * n, 300 * n, 4.0))
    for n in range(1, 60):
        observe(speeds, counted(50 * n, 300 * n, 1.0))
    assert speeds.factors("w") == pytest.approx((1.0, 1.0), rel=0.15)


def test_little_time_says_nothing() -> None:
    speeds = Speeds()
    observe(speeds, counted(1, 2, 4.0))
    assert speeds.factors("w") == (1.0, 1.0)


def test_devices_are_known_by_name() -> None:
    assert ceilings("NVIDIA H200", 132).bandwidth > ceilings("NVIDIA A100-SXM4-80GB", 108).bandwidth
    assert ceilings("cpu", 4).flops == 4 * ceilings("cpu", 1).flops
    assert ceilings("some accelerator", 1) == ceilings("NVIDIA A100-SXM4-80GB", 108)
