"""What the advisor looks at: workers, models with their places and traffic, and what may be changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxserve.placement.solver.capacity import Estimator
from muxserve.placement.solver.fixed import FixedObjective, Loaded, Machine
from muxserve.placement.solver.machines import Footprint, MachineCosts, ceilings
from muxserve.placement.solver.workload import Model
from muxserve.placement.traffic import Flow

LOAD_SECONDS, LOAD_BYTES = 1.0, 150e6
"""Seconds of a load that was never measured: so many, and one for so many bytes."""
BACKLOG = 60.0
"""Seconds within which requests that wait already should be served: they count as so much more traffic."""
IDLE = 0.02
"""Requests per second below which a model may be loaded nowhere."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker, as it says it is."""

    id: str
    device: str
    compute_units: int
    weight_budget: int
    """Bytes that weights may take; 0: no limit."""
    kv_bytes: int
    """Of its arena."""
    prefill_factor: float = 1.0
    decode_factor: float = 1.0
    """How many times as long as predicted its jobs were seen to take."""
    closed: bool = False
    """Whether nothing may be brought there: it is being drained, or is away."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model, its places and its traffic."""

    name: str
    weight_bytes: int
    kv_bytes: int
    """Of a token."""
    layers: int
    flow: Flow
    loaded: frozenset[str] = frozenset()
    """Workers that have its weights, or load them."""
    asleep: frozenset[str] = frozenset()
    """Workers that would load them on demand."""
    pinned: bool = False
    min_resident: int = 0
    refused_by: frozenset[str] = frozenset()
    """Workers that cannot have it."""
    waiting: int = 0
    """Requests that nobody computes yet."""
    load_seconds: float = 0.0
    """Measured; 0: it was not."""
    frozen: bool = False
    """Whether it is to stay as it is, since it was moved only now."""


@dataclass(frozen=True, slots=True)
class Move:
    """From one worker to another. No source: a further place; no target: one place less."""

    model: str
    source: str = ""
    target: str = ""


class Situation:
    """Workers and models by index, what is loaded, and what it is worth."""

    def __init__(self, workers: Sequence[Worker], models: Sequence[Served], horizon: float) -> None:
        """`horizon`: seconds that count."""
        self.workers, self.models = workers, models
        self.now: Loaded = tuple(
            frozenset(i for i, model in enumerate(models) if worker.id in model.loaded) for worker in workers
        )
        planned = [
            Model(
                m.name,
                m.name,
                m.flow.rate + m.waiting / BACKLOG,
                m.flow.prompt_tokens,
                m.flow.output_tokens,
                Footprint.of(m.weight_bytes, m.kv_bytes, m.layers),
            )
            for m in models
        ]
        sizes = [[None if w.id in m.refused_by else m.weight_bytes for w in workers] for m in models]
        self.objective = FixedObjective(_machines(workers, models), planned, sizes, horizon)

    def fits(self, k: int, models: frozenset[int]) -> bool:
        """Whether worker `k` may have all of these loaded."""
        return self.objective.fits(k, models)

    def may_come(self, i: int, k: int) -> bool:
        """Whether model `i` may be brought to worker `k`."""
        frozen = self.models[i].frozen and i not in self.now[k]
        return not frozen and not self.workers[k].closed and self.objective.can(i, k)

    def may_go(self, i: int, k: int) -> bool:
        """Whether model `i` may be taken off worker `k`."""
        model = self.models[i]
        return not model.frozen and not (model.pinned and i in self.now[k])

    def can_spare(self, state: Loaded, i: int) -> bool:
        """Whether model `i` may have one place less than in `state`."""
        model = self.models[i]
        idle = model.flow.rate < IDLE and not model.waiting
        return sum(i in models for models in state) > max(model.min_resident, 0 if idle else 1)

    def load_seconds(self, i: int) -> float:
        """That loading model `i` takes."""
        return self.models[i].load_seconds or LOAD_SECONDS + self.models[i].weight_bytes / LOAD_BYTES


def changed(state: Loaded, sets: Mapping[int, frozenset[int]]) -> Loaded:
    """`state` with other models on some workers."""
    return tuple(sets.get(k, models) for k, models in enumerate(state))


def _machines(workers: Sequence[Worker], models: Sequence[Served]) -> list[Machine]:
    footprints = {m.name: Footprint.of(m.weight_bytes, m.kv_bytes, m.layers) for m in models}
    estimators: dict[tuple[object, ...], Estimator] = {}
    machines = []
    for worker in workers:
        key = (worker.device, worker.compute_units, worker.prefill_factor, worker.decode_factor)
        if key not in estimators:
            device = ceilings(worker.device, worker.compute_units)
            costs = MachineCosts(footprints, device, worker.prefill_factor, worker.decode_factor)
            estimators[key] = Estimator(costs, device.bandwidth)
        budget = worker.weight_budget or math.inf
        machines.append(Machine(worker.id, budget, worker.kv_bytes, estimators[key]))
    return machines
