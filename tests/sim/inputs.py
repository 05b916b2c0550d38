"""Small clusters for the simulator."""

from __future__ import annotations

from muxserve.placement.solver.placement import Placed, Placement, Unit
from muxserve.placement.solver.workload import Workload
from tests.placement.solver.inputs import workload


def two_models(rate: float = 2.0) -> Workload:
    """Of a popular and an unpopular model."""
    return workload({"hot": ("llama-7b", rate), "cold": ("llama-13b", rate / 4)}, gpus=2)


def together(work: Workload, *gpus: int) -> Placement:
    """All models on each of these GPUs of node 0."""
    models = tuple(Placed(m.name, m.model, 1) for m in work.models)
    return Placement(tuple(Unit(((0, gpu),), models) for gpu in gpus))
