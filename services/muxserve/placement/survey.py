"""Asks the workers what they have and what each model would take there, and finds places."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxserve.common.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    ServiceError,
    Unavailable,
)
from muxserve.placement.document import ASLEEP, Plan, PlannedModel, loads
from muxserve.placement.fit import Capacity, Demand, Refusal, fit
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, common_pb2, worker_pb2

TRANSIENT = (Unavailable, DeadlineExceeded, Cancelled)
"""Errors that say nothing about the model: the call is to be made again."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a model goes."""

    worker: str
    shape: common_pb2.ModelShape
    asleep: bool
    """Whether there is room for it only while others sleep."""


def refusal(error: ServiceError) -> Refusal:
    """What a worker's error says about a model."""
    if isinstance(error, InvalidArgument):
        return Refusal(error.reason, error.field)
    return Refusal(str(error), "weight_budget" if isinstance(error, Overloaded) else "")


def stays(plan: Plan, model: PlannedModel) -> bool:
    """Whether the model's weights have to stay loaded."""
    return plan.pinned(model.name) or model.config.min_resident > 0


async def find_places(
    plan: Plan, names: Sequence[str], workers: Sequence[admin_pb2.ServiceEntry], calls: WorkerCalls
) -> Mapping[str, Assignment | Refusal]:
    """A place, or why there is none, for each model in `names`. Raises ServiceError if a
    worker cannot be asked."""
    infos = await asyncio.gather(*(calls.info(worker.address) for worker in workers))
    pairs = [(name, worker) for name in names for worker in workers]
    answers = await asyncio.gather(
        *(_inspect(calls, worker.address, plan.models[name].config) for name, worker in pairs)
    )
    found = {(name, worker.id): answer for (name, worker), answer in zip(pairs, answers, strict=True)}
    load = loads(plan.models)
    demands = []
    outcome: dict[str, Assignment | Refusal] = {}
    for name in names:
        sizes, refusals = {}, []
        for worker in workers:
            answer = found[name, worker.id]
            if isinstance(answer, Refusal):
                refusals.append(answer)
            else:
                sizes[worker.id] = answer.weight_bytes
        if sizes:
            priority = plan.models[name].config.residency_priority
            demands.append(Demand(name, sizes, load[name], stays(plan, plan.models[name]), priority))
        else:
            outcome[name] = refusals[0] if refusals else Refusal("there is no worker", "")
    capacities = [_capacity(plan, worker.id, info, load) for worker, info in zip(workers, infos, strict=True)]
    decision = fit(demands, capacities)
    outcome.update(decision.refused)
    for name, worker_id in decision.assigned.items():
        shape = found[name, worker_id]
        assert isinstance(shape, common_pb2.ModelShape)
        outcome[name] = Assignment(worker_id, shape, name in decision.asleep)
    return outcome


async def _inspect(
    calls: WorkerCalls, address: str, model: common_pb2.ModelConfig
) -> common_pb2.ModelShape | Refusal:
    try:
        return await calls.inspect(address, model)
    except TRANSIENT:
        raise
    except ServiceError as error:
        return refusal(error)


def _capacity(plan: Plan, worker: str, info: worker_pb2.WorkerInfo, load: Mapping[str, float]) -> Capacity:
    """What is left on `worker` beside the models that are assigned to it; those asleep need no room."""
    places = plan.of_worker(worker)
    awake = [(model, p.shape.weight_bytes) for model, p in places if p.shape and p.state != ASLEEP]
    load_there = sum(load[model.name] for model, _ in places)
    if not (budget := info.weight_budget_bytes):
        return Capacity(worker, None, load_there)
    room = max(0, budget - sum(size for _, size in awake))
    for_turns = budget - sum(size for model, size in awake if stays(plan, model))
    return Capacity(worker, room, load_there, for_turns)
