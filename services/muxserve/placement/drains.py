"""`Drains`: workers that all models are to leave, and that get none until that is undone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

import structlog

from muxserve.common.errors import Aborted, FailedPrecondition, ServiceError
from muxserve.placement import migration as machine
from muxserve.placement.document import Plan
from muxserve.placement.fit import Refusal
from muxserve.placement.migrations import Migrations, Order, every
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.survey import find_places
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

AUTHOR = "drain"
PAUSE = 2.0
"""Seconds between attempts to go on with a drain."""


class Drains:
    """That a worker is drained is in the document, so a drain goes on whoever dies. An `Adviser` of the
    reconciler, for that."""

    def __init__(self, migrations: Migrations, reconciler: Reconciler, calls: WorkerCalls) -> None:
        self._migrations = migrations
        self._reconciler = reconciler
        self._calls = calls
        self._task: asyncio.Task[None] | None = None
        self._next = 0.0
        """Loop time before which a drain that does not come on is left alone."""
        reconciler.advisers.append(self)

    async def start(self, worker: str, drain_seconds: float | None = None) -> None:
        """Have all models leave `worker`. Raises NotFound, FailedPrecondition (then nothing changes)."""
        plan, name = self._migrations.plan, self._migrations.worker(worker)
        orders = await self._evacuation(name)
        if self._migrations.plan is not plan:
            raise Aborted("the placement has changed meanwhile; try again")
        self._plan(plan, name, orders, drain_seconds)
        plan.drained.add(name)
        await self._migrations.published(lambda document: name in document.drained_workers)

    async def undo(self, worker: str) -> None:
        """`worker` may have models again; what goes on for a drain of it is rolled back. Raises NotFound."""
        plan, name = self._migrations.plan, self._migrations.worker(worker)
        plan.drained.discard(name)
        plan.planned = [each for each in plan.planned if not _of(each, name)]
        now = plan.migration
        if now is not None and _of(now, name) and now.phase in machine.REVERSIBLE:
            machine.roll_back(plan, "the drain was undone")
        await self._migrations.published(lambda document: name not in document.drained_workers)

    def left(self, worker: str) -> int:
        """Models that are on `worker`, as the document says."""
        units = self._reconciler.placement.units
        return sum(len(unit.models) for unit in units if unit.worker_id == worker)

    async def follow(self, worker: str) -> AsyncIterator[admin_pb2.Migration]:
        """Each migration of a drain of `worker` whenever it has come a phase further, until there is no
        model left or the drain is undone."""
        first = round(time.time() * 1000)
        told: dict[str, machine.Phase] = {}
        while True:
            document = self._reconciler.placement
            for migration in every(document):
                fresh = not migration.ended_unix_ms or migration.ended_unix_ms >= first
                if _of(migration, worker) and fresh and told.get(migration.id) != migration.phase:
                    told[migration.id] = migration.phase
                    yield migration
            if worker not in document.drained_workers or not self.left(worker):
                return
            await self._reconciler.changed(document.epoch)

    async def attend(self, plan: Plan, workers: Mapping[str, admin_pb2.ServiceEntry]) -> float:
        """Go on with drains that have not ended."""
        left = [place.worker for _, place in plan.places() if place.worker in plan.drained]
        idle = not plan.under_way and self._task is None
        if left and idle and asyncio.get_running_loop().time() >= self._next:
            self._task = asyncio.create_task(self._go_on(plan, left[0]), name=f"drain {left[0]}")
        return PAUSE

    async def close(self) -> None:
        """Leave drains to whoever comes next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _go_on(self, plan: Plan, worker: str) -> None:
        try:
            orders = await self._evacuation(worker)
            if self._reconciler.plan is plan and worker in plan.drained:
                self._plan(plan, worker, orders, None)
        except ServiceError as error:
            log.warning("a drain does not go on", worker=worker, reason=str(error))
        finally:
            self._next = asyncio.get_running_loop().time() + PAUSE
            self._task = None
            self._reconciler.wake()

    def _plan(self, plan: Plan, worker: str, orders: list[Order], drain_seconds: float | None) -> None:
        busy = {migration.model for migration in plan.planned if _of(migration, worker)}
        plan.planned += [
            self._migrations.planned(order, AUTHOR, f"{worker} is drained", drain_seconds)
            for order in orders
            if order.model not in busy
        ]

    async def _evacuation(self, worker: str) -> list[Order]:
        """How the models of `worker` are to leave it. Raises FailedPrecondition if one has nowhere to go."""
        plan = self._migrations.plan
        orders: list[Order] = []
        homeless = []
        for model, _ in plan.of_worker(worker):
            elsewhere = [place for place in model.places.values() if place.worker != worker]
            if any(place.loaded and place.worker not in plan.drained for place in elsewhere):
                orders.append(Order(model.name, worker, ""))
            else:
                homeless.append(model.name)
        closed = plan.drained | {worker}
        others = [entry for entry in self._reconciler.workers.values() if entry.id not in closed]
        found = await find_places(plan, homeless, others, self._calls) if homeless else {}
        for name, target in found.items():
            if isinstance(target, Refusal):
                raise FailedPrecondition(f'model "{name}" has nowhere to go: {target.reason}')
            orders.append(Order(name, worker, target.worker, target.asleep))
        return orders


def _of(migration: admin_pb2.Migration, worker: str) -> bool:
    """Whether it is part of a drain of `worker`."""
    return migration.author == AUTHOR and migration.source_worker == worker
