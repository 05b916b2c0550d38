"""`Migrations`: what operators and the advisor ask for, checked and put into the placement document."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from muxserve.common.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from muxserve.placement import migration as machine
from muxserve.placement.document import Plan, PlannedModel
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.rooms import Rooms
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

PUBLISH_TIMEOUT = 5.0
"""Seconds for a change to get into the document."""

Migration = admin_pb2.Migration


@dataclass(frozen=True, slots=True)
class Order:
    """A move that is asked for."""

    model: str
    source: str
    """Worker that it leaves. Empty: it is loaded on one more."""
    target: str
    """Worker that it goes to. Empty: it is unloaded."""
    asleep: bool = False
    """Whether it sleeps there until a request wakes it."""


class Migrations:
    """Changes the reconciler's plan, and says when that is in the document. Methods raise Unavailable before
    the plan is known, while Redis is away, and where a worker that has to be asked does not answer; Aborted
    where somebody else has written the document meanwhile."""

    def __init__(self, reconciler: Reconciler, calls: WorkerCalls, drain_seconds: float) -> None:
        """`drain_seconds`: that sequences have to finish where nothing else is said."""
        self._reconciler = reconciler
        self._calls = calls
        self._drain_seconds = drain_seconds

    @property
    def plan(self) -> Plan:
        """What the document is to say."""
        if self._reconciler.plan is None:
            raise Unavailable("placement has just begun")
        return self._reconciler.plan

    async def start(
        self, orders: Sequence[Order], author: str, reason: str = "", drain_seconds: float | None = None
    ) -> list[str]:
        """Plan migrations, to be carried out one after the other; their ids, in the order of `orders`.

        Raises NotFound (model, worker) or FailedPrecondition: migrations are under way, or one of these
        cannot be. Nothing is changed then.
        """
        if not orders:
            return []
        self._check_idle()
        for order in orders:
            self._check(order)
        to_load = [(order.model, order.target) for order in orders if order.target and not order.asleep]
        rooms = await Rooms.measure(self.plan, to_load, self._reconciler.workers, self._calls)
        self._check_idle()  # much may have changed meanwhile
        for order in orders:
            self._check(order)
            rooms.take(self.plan, order.model, order.source, "" if order.asleep else order.target)
        planned = [self.planned(order, author, reason, drain_seconds) for order in orders]
        self.plan.planned += planned
        ids = [each.id for each in planned]
        await self.published(lambda document: set(ids) <= _ids(document))
        return ids

    async def cancel(self, migration_id: str = "") -> Migration:
        """Roll back the migration under way (`migration_id`: only if it is that one), and drop what is to
        follow. Raises NotFound, FailedPrecondition."""
        plan = self.plan
        found = next(iter(plan.under_way), None)
        if found is None or migration_id not in ("", found.id):
            raise NotFound("migration", migration_id, "none is under way" if found is None else "")
        if found.phase not in machine.REVERSIBLE | {machine.ROLLING_BACK}:
            raise FailedPrecondition(f'migration "{found.id}" cannot be rolled back any more')
        plan.planned.clear()
        if plan.migration is not None and found.phase in machine.REVERSIBLE:
            machine.roll_back(plan, "cancelled")
        await self.published(lambda document: _phase(document, found.id) not in machine.REVERSIBLE)
        return found

    async def pin(self, model: str, pinned: bool) -> int:
        """Pin a model, or lift that; the document's epoch that says so. Raises NotFound."""
        self.model(model)
        self.plan.pins[model] = pinned
        await self.published(lambda document: document.pinned.get(model) == pinned)
        return self._reconciler.placement.epoch

    async def follow(self, ids: Collection[str]) -> AsyncIterator[Migration]:
        """Each of these migrations whenever it has come a phase further, until all have ended."""
        told: dict[str, machine.Phase] = {}
        left = set(ids)
        while left:
            document = self._reconciler.placement
            for migration in every(document):
                if migration.id in left and told.get(migration.id) != migration.phase:
                    told[migration.id] = migration.phase
                    yield migration
                if migration.ended_unix_ms:
                    left.discard(migration.id)
            left &= _ids(document)  # of those that were dropped nothing more will be heard
            if left:
                await self._reconciler.changed(document.epoch)

    def model(self, name: str) -> PlannedModel:
        """Raises NotFound, InvalidArgument."""
        if not name:
            raise InvalidArgument("model", "required")
        if name not in self.plan.models:
            raise NotFound("model", name, f"there are {', '.join(self.plan.models) or 'none'}")
        return self.plan.models[name]

    def worker(self, worker: str, field: str = "worker") -> str:
        """Raises NotFound, InvalidArgument."""
        if not worker:
            raise InvalidArgument(field, "required")
        if worker not in self.plan.workers:
            raise NotFound("worker", worker, f"there are {', '.join(self.plan.workers) or 'none'}")
        return worker

    def source(self, name: str, worker: str, field: str) -> str:
        """The worker that the model is to leave: `worker`, or where that is empty, the only one that has it.
        Raises NotFound, InvalidArgument, FailedPrecondition."""
        places = self.model(name).places
        if worker:
            return self.worker(worker, field)
        if not places:
            raise FailedPrecondition(f'model "{name}" is on no worker')
        if len(places) > 1:
            raise InvalidArgument(field, f'required, since model "{name}" is on {", ".join(sorted(places))}')
        return next(iter(places))

    def is_loaded(self, name: str, worker: str) -> bool:
        """Whether the model is loaded on that worker, or is being loaded."""
        place = self.model(name).places.get(self.worker(worker))
        return place is not None and place.loaded

    def check_unload(self, name: str, worker: str) -> None:
        """Raises FailedPrecondition if too few places would be left loaded."""
        model = self.model(name)
        least = max(model.config.min_resident, int(self.plan.pinned(name)))
        left = sum(place.loaded for place in model.places.values() if place.worker != worker)
        if left < least:
            reason = "it is pinned" if model.config.min_resident < least else f"its min_resident is {least}"
            raise FailedPrecondition(f'model "{name}" has to stay loaded on {worker}: {reason}')

    # Into the document

    def planned(
        self, order: Order, author: str, reason: str, drain_seconds: float | None = None
    ) -> Migration:
        """The migration that carries `order` out."""
        return Migration(
            id=uuid.uuid4().hex[:12],
            model=order.model,
            source_worker=order.source,
            target_worker=order.target,
            phase=machine.PLANNED,
            author=author,
            reason=reason,
            began_unix_ms=round(time.time() * 1000),
            drain_seconds=self._drain_seconds if drain_seconds is None else drain_seconds,
            asleep=order.asleep,
        )

    def _check_idle(self) -> None:
        busy = next(iter(self.plan.under_way), None)
        if busy is not None:
            way = f"{busy.source_worker or 'nowhere'} to {busy.target_worker or 'nowhere'}"
            raise FailedPrecondition(
                f'a migration is already under way: {busy.id}, model "{busy.model}" from {way}'
            )

    def _check(self, order: Order) -> None:
        """Raises FailedPrecondition, NotFound, InvalidArgument."""
        self.model(order.model)
        if order.source:
            self.worker(order.source, "source_worker")
        if order.target:
            self.worker(order.target, "target_worker")
        if not order.source and not order.target:
            raise InvalidArgument("target_worker", "required")
        wanted = self.planned(order, "", "")
        if problem := machine.obstacle(self.plan, wanted, self._reconciler.workers.keys()):
            raise FailedPrecondition(problem)

    async def published(self, true: Callable[[admin_pb2.Placement], bool]) -> None:
        """Returns when the document says what the plan was changed to."""
        plan, reconciler = self._reconciler.plan, self._reconciler
        reconciler.wake()
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT):
                while not true(reconciler.placement):
                    if reconciler.plan is not plan:
                        raise Aborted("somebody else has changed the placement; try again")
                    await reconciler.changed(reconciler.placement.epoch)
        except TimeoutError:
            raise Unavailable(
                "the placement cannot be written now; it will be as soon as Redis answers"
            ) from None


def every(document: admin_pb2.Placement) -> list[Migration]:
    """Those that have ended, the one under way, and those that are planned."""
    now = [document.migration] if document.HasField("migration") else []
    return [*document.ended, *now, *document.planned]


def _ids(document: admin_pb2.Placement) -> set[str]:
    return {migration.id for migration in every(document)}


def _phase(document: admin_pb2.Placement, migration_id: str) -> machine.Phase | None:
    return next((each.phase for each in every(document) if each.id == migration_id), None)
