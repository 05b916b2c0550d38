"""How long a request takes with nothing beside it: what service level objectives are multiples of."""

from __future__ import annotations

from collections.abc import Callable

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.placement import kv_needed, kv_room
from muxserve.placement.solver.workload import Model, Workload


def alone(model: Model, workload: Workload, costs: CostModel) -> Callable[[float, float], float]:
    """Seconds of a request of (prompt, output) tokens on the smallest mesh that its model fits; infinity if
    there is none."""
    usable = max(node.usable_bytes for node in workload.nodes)
    shape = model.shape
    fitting = [
        degree
        for degree in costs.degrees(model.model, shape)
        if kv_room(usable, degree, [shape.weight_bytes]) >= kv_needed([shape.kv_bytes])
    ]
    if not fitting:
        return lambda prompt, output: float("inf")
    degree = fitting[0]

    def seconds(prompt: float, output: float) -> float:
        step = costs.decode(model.model, degree, 1.0, 1, prompt + output / 2)
        return costs.prefill(model.model, degree, 1.0, 1, prompt) + (output - 1) * step

    return seconds
