"""What a prefill and a decode job that run side by side cost each other beyond their shares."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.placement.solver.roofline import A100
from muxserve.placement.solver.shapes import ITEM, Shape

BANDWIDTH = A100.bandwidth
"""Bytes per second of one GPU."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A job as its neighbour feels it."""

    share: float
    """Of the SMs."""
    bandwidth: float
    """Part of the memory bandwidth that it uses."""


def bandwidth_use(
    shape: Shape, degree: int, tokens: float, seconds: float, bandwidth: float = BANDWIDTH
) -> float:
    """Part of the bandwidth that a job uses which takes `seconds`: it reads the weights once and reads or
    writes K and V of `tokens` tokens. `bandwidth` in bytes per second of one device."""
    moved = shape.active_parameters * ITEM + shape.kv_bytes * tokens
    return min(1.0, moved / degree / (bandwidth * max(seconds, 1e-9)))


def slowdown(*jobs: Beside) -> float:
    """By what all take longer: where their shares overlap they take turns on the SMs, and together they
    cannot move more bytes than the memory does."""
    return max(1.0, sum(job.share for job in jobs), sum(job.bandwidth for job in jobs))
