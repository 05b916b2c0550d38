"""`Rooms`: whether there is room for weights where models are to go, one after the other."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from muxserve.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from muxserve.placement.document import ASLEEP, Plan
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

MIB = 2**20


@dataclass(slots=True)
class Rooms:
    """What is free on the workers that models are to go to."""

    free: dict[str, float]
    """Bytes of weights, by worker."""
    sizes: Mapping[tuple[str, str], int]
    """Bytes of weights, by model and worker."""

    @classmethod
    async def measure(
        cls,
        plan: Plan,
        moves: Iterable[tuple[str, str]],
        workers: Mapping[str, admin_pb2.ServiceEntry],
        calls: WorkerCalls,
    ) -> Rooms:
        """Ask the workers. `moves`: models and their targets. Raises Unavailable, and FailedPrecondition
        where a worker refuses a model."""
        pairs = list(dict.fromkeys(moves))
        targets = sorted({target for _, target in pairs})
        if away := [target for target in targets if target not in workers]:
            raise Unavailable(f"{away[0]} is away")
        infos = await asyncio.gather(*(calls.info(workers[target].address) for target in targets))
        try:
            shapes = await asyncio.gather(
                *(calls.inspect(workers[target].address, plan.models[name].config) for name, target in pairs)
            )
        except InvalidArgument as error:
            raise FailedPrecondition(f"a worker refuses the model: {error}") from error
        free = {}
        for target, info in zip(targets, infos, strict=True):
            places = [place for _, place in plan.of_worker(target) if place.state != ASLEEP]
            taken = sum(place.shape.weight_bytes for place in places if place.shape)
            free[target] = info.weight_budget_bytes - taken if info.weight_budget_bytes else math.inf
        return cls(free, {pair: shape.weight_bytes for pair, shape in zip(pairs, shapes, strict=True)})

    def take(self, plan: Plan, name: str, source: str, target: str) -> None:
        """Move a model there; its source (empty: none) has more room after that. Raises FailedPrecondition if
        it does not fit."""
        model = plan.models[name]
        place = model.places.get(source)
        if target and not (place is not None and place.state == ASLEEP):
            needed = self.sizes[name, target]
            if needed > self.free[target]:
                raise FailedPrecondition(
                    f'{target} has no room for model "{name}": its weights need {needed / MIB:.1f} MiB, '
                    f"{self.free[target] / MIB:.1f} MiB are free"
                )
            self.free[target] -= needed
        if place is not None and place.shape is not None and place.state != ASLEEP and source in self.free:
            self.free[source] += place.shape.weight_bytes
