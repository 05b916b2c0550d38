"""The loop that makes what is served what is configured: it places models, has them loaded, and says so.

Every round compares three things: the configuration, the workers in the registry, and the placement
document. What follows from them is written to the document first, with compare-and-set, and done then. Calls
that take long (inspecting, loading) run beside the rounds and wake them when they end, so that a round never
waits for a worker. All state can be lost: the document is where the next process goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

import structlog

from muxserve.common.documents import PlacementStore
from muxserve.common.errors import ServiceError, Unavailable
from muxserve.common.registry import Registry
from muxserve.placement.document import Place, Plan, from_document, to_document
from muxserve.placement.errands import BACKOFF, Errands
from muxserve.placement.fit import Refusal
from muxserve.placement.migration import Seen, advance
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.sources import SourceWatch
from muxserve.placement.survey import find_places
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

POLL = 0.3
"""Seconds between rounds while nothing wakes them."""

Entry = admin_pb2.ServiceEntry
Fleet = frozenset[tuple[str, str]]
"""Ids and incarnations of workers."""


class Adviser(Protocol):
    """Has a say in every round."""

    async def attend(self, plan: Plan, workers: Mapping[str, Entry]) -> float:
        """Change `plan`, which is written to the document then; `workers`: those that are there, by id.
        Seconds until the next round at the latest. Raises Unavailable while Redis is away."""


class Reconciler:
    """Owner of the placement document."""

    def __init__(
        self,
        settings: PlacementSettings,
        registry: Registry,
        store: PlacementStore,
        calls: WorkerCalls,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._store = store
        self._calls = calls
        self._epoch = 0
        self._heard = 0
        """The highest epoch that a worker has heard of."""
        self._mine = False
        """Whether this process has written the document."""
        self._started = time.monotonic()
        self._woken = asyncio.Event()
        self._judged: Fleet = frozenset()
        self._survey: asyncio.Task[None] | None = None
        self._errands = Errands(calls, self.wake, self._hear)
        self._source = SourceWatch(calls, self.wake)
        self._away: set[str] = set()
        """Workers that were there and are not."""
        self._new: dict[str, Entry] = {}
        """Workers that were not told of the document yet, by id."""
        self._news: set[asyncio.Event] = set()
        self.advisers: list[Adviser] = []
        self.plan: Plan | None = None
        """What the document is to say. Whoever changes it calls `wake`; None before the first round."""
        self.workers: Mapping[str, Entry] = {}
        """Those that are there, by id."""
        self.placement = admin_pb2.Placement()
        """The document as last seen or written."""

    def wake(self) -> None:
        """Run a round soon."""
        self._woken.set()

    async def changed(self, epoch: int) -> admin_pb2.Placement:
        """The document, as soon as it is newer than `epoch`."""
        while self.placement.epoch <= epoch:
            news = asyncio.Event()
            self._news.add(news)
            try:
                await news.wait()
            finally:
                self._news.discard(news)
        return self.placement

    async def run(self) -> None:
        """Run rounds until cancelled."""
        away, rest = False, POLL
        try:
            while True:
                self._woken.clear()
                try:
                    rest = await self._round()
                    away = False
                except Unavailable as error:
                    if not away:
                        log.warning("placement waits", reason=str(error))
                    away = True
                await self._rest(rest)
        finally:
            if self._survey is not None:
                self._survey.cancel()
                await asyncio.gather(self._survey, return_exceptions=True)
            await self._source.close()
            await self._errands.close()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _round(self) -> float:
        """Seconds until the next one."""
        workers = {entry.id: entry for entry in await self._registry.list("worker")}
        stored = await self._store.read()
        plan = self._adopt(stored)
        self.workers = workers
        for absent in plan.workers.keys() - workers.keys():
            self._lose(plan, absent)
        for worker in workers.values():
            self._meet(plan, worker)
        self._start_survey(plan, workers)
        rests = [await adviser.attend(plan, workers) for adviser in self.advisers]
        before = plan.migration
        advance(plan, Seen(workers.keys(), self._source.open_sequences(plan), round(time.time() * 1000)))
        if plan.migration is not before or (before is not None and before != stored.migration):
            _tell(plan.migration or before)
        document = to_document(plan)
        if await self._publish(stored, document) and _same(document, to_document(plan)):
            self._source.follow(plan, workers)
            for worker in self._new.values():
                self._errands.meet(plan, worker, document.epoch)
            self._new.clear()
            self._errands.follow(plan, workers, document.epoch)
        else:
            self.wake()
        return min([POLL, *rests])

    def _adopt(self, stored: admin_pb2.Placement) -> Plan:
        """The plan; if somebody else has written a newer document, the one that goes on from that."""
        if self.plan is None or stored.epoch > self._epoch:
            if self.plan is not None:
                log.warning("somebody else wrote the placement", epoch=stored.epoch)
            self._errands.stop_all()
            self._judged = frozenset()
            self.plan = from_document(stored, self._settings.models)
            self._epoch = stored.epoch
        return self.plan

    def _hear(self, epoch: int) -> None:
        """A worker has heard of a document of this epoch."""
        if epoch > self._heard:
            self._heard = epoch
            self.wake()

    def _lose(self, plan: Plan, worker: str) -> None:
        """The worker is not in the registry."""
        if worker not in self._away:
            log.warning("worker is away", id=worker)
            self._away.add(worker)
        for model, _ in plan.of_worker(worker):
            self._errands.stop(model.name, worker)
        self._errands.leave(worker)
        self._new.pop(worker, None)
        plan.lose(worker)

    def _meet(self, plan: Plan, worker: Entry) -> None:
        """A worker is in the registry."""
        before = plan.workers.get(worker.id)
        same = plan.meet(worker)
        if same and before is not None and before.pid == worker.pid and worker.id not in self._away:
            return
        # A new process, or one that was away, or is known from the document alone: this placement process is
        # the newer one then.
        log.info("worker", id=worker.id, address=worker.address, known=same)
        self._away.discard(worker.id)
        if not same:
            for model, _ in plan.of_worker(worker.id):
                self._errands.stop(model.name, worker.id)
        self._new[worker.id] = worker

    def _start_survey(self, plan: Plan, workers: Mapping[str, Entry]) -> None:
        """Look for places for the models that have none, once for each set of worker processes."""
        open_workers = [entry for entry in workers.values() if entry.id not in plan.drained]
        fleet = frozenset((entry.id, entry.incarnation) for entry in open_workers)
        names = [name for name, model in plan.models.items() if not model.places]
        waited = time.monotonic() - self._started
        enough = len(workers) >= self._settings.workers or waited > self._settings.worker_wait
        if self._survey or not names or not open_workers or not enough or fleet == self._judged:
            return
        self._survey = asyncio.create_task(self._place(plan, names, open_workers, fleet), name="survey")

    async def _place(self, plan: Plan, names: list[str], workers: list[Entry], fleet: Fleet) -> None:
        try:
            outcome = await find_places(plan, names, workers, self._calls)
        except ServiceError as error:
            log.warning("cannot ask the workers about models; trying again", error=str(error))
            await asyncio.sleep(BACKOFF)
        else:
            self._judged = fleet
            for name, assigned in outcome.items():
                model = plan.models[name]
                if isinstance(assigned, Refusal):
                    model.refusal = assigned
                    log.error("model refused", model=name, field=assigned.field, reason=assigned.reason)
                else:
                    place = Place(assigned.worker, shape=assigned.shape, occupied=not assigned.asleep)
                    model.add(place)
                    if assigned.asleep:
                        place.sleep()
                    log.info("model placed", model=name, worker=assigned.worker, asleep=assigned.asleep)
        finally:
            self._survey = None
            self.wake()

    async def _publish(self, stored: admin_pb2.Placement, wanted: admin_pb2.Placement) -> bool:
        """Write `wanted` unless `stored`, which is what Redis has, says the same. False: somebody else has
        written meanwhile.

        A process begins with a new epoch in any case: what it does not know of, because the one before it was
        about to do it, follows from an older one then, and workers refuse that.
        """
        wanted.epoch = stored.epoch
        if not self._mine or self._heard > stored.epoch or not _same(wanted, stored):
            # Above every epoch of before, even if Redis has lost the document.
            wanted.epoch = max(self._epoch, self._heard, stored.epoch) + 1
            if not await self._store.compare_and_set(stored.epoch, wanted):
                return False
            self._mine = True
        self._epoch = max(self._epoch, wanted.epoch)
        if self.placement != wanted:
            self.placement = wanted
            for news in self._news:
                news.set()
        return True


def _same(one: admin_pb2.Placement, other: admin_pb2.Placement) -> bool:
    """Whether they say the same, whatever their epochs."""
    there = admin_pb2.Placement()
    there.CopyFrom(other)
    there.epoch = one.epoch
    return one == there


def _tell(migration: admin_pb2.Migration | None) -> None:
    if migration is not None:
        log.info(
            "migration",
            id=migration.id,
            model=migration.model,
            source=migration.source_worker,
            target=migration.target_worker,
            phase=admin_pb2.MigrationPhase.Name(migration.phase).removeprefix("MIGRATION_PHASE_").lower(),
            error=migration.error,
        )
