"""The loop that makes what is served what is configured: it places models, has them loaded, and says so.

Every round compares three things: the configuration, the workers in the registry, and the placement document.
Calls that take long (inspecting, loading) run beside the rounds and wake them when they end, so that a round
never waits for a worker. All state can be lost: the document is where the next process goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from muxserve.common.documents import PlacementStore
from muxserve.common.errors import AlreadyExists, Cancelled, NotFound, ServiceError, Unavailable
from muxserve.common.registry import Registry
from muxserve.placement.document import LOADING, Plan, from_document, to_document
from muxserve.placement.fit import Refusal
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.survey import find_places, refusal
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

POLL = 0.3
"""Seconds between rounds while nothing wakes them."""

BACKOFF = 0.5
"""Seconds after which a call that failed for a passing reason is made again."""

Fleet = frozenset[tuple[str, str]]
"""Ids and incarnations of workers."""


class Reconciler:
    """Owner of the placement document."""

    def __init__(
        self, settings: PlacementSettings, registry: Registry, store: PlacementStore, calls: WorkerCalls
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._store = store
        self._calls = calls
        self._plan: Plan | None = None
        self._epoch = 0
        self._started = time.monotonic()
        self._wake = asyncio.Event()
        self._judged: Fleet = frozenset()
        self._survey: asyncio.Task[None] | None = None
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self.placement = admin_pb2.Placement()
        """The document as last seen or written."""

    async def run(self) -> None:
        """Run rounds until cancelled."""
        away = False
        try:
            while True:
                self._wake.clear()
                try:
                    await self._round()
                    away = False
                except Unavailable as error:
                    if not away:
                        log.warning("placement waits", reason=str(error))
                    away = True
                await self._rest()
        finally:
            tasks = [*self._loads.values(), *self._chores, *([self._survey] if self._survey else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(POLL):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _round(self) -> None:
        workers = {entry.id: entry for entry in await self._registry.list("worker")}
        stored = await self._store.read()
        if self._plan is None:
            self._plan = from_document(stored, self._settings.models)
        for absent in self._plan.workers.keys() - workers.keys():
            self._lose(self._plan, absent)
        for worker in workers.values():
            self._meet(self._plan, worker)
        self._start_survey(self._plan, workers)
        for name, model in self._plan.models.items():
            if model.worker in workers and model.state == LOADING and name not in self._loads:
                self._loads[name] = asyncio.create_task(self._load(self._plan, name), name=f"load {name}")
        await self._publish(stored, to_document(self._plan))

    def _lose(self, plan: Plan, worker: str) -> None:
        """The worker is not in the registry: its models wait for it."""
        for model in plan.of_worker(worker):
            reason = f"{worker} is away"
            if model.reason != reason:
                log.warning("model waits for its worker", model=model.config.name, worker=worker)
            model.loading(reason)
            self._stop_load(model.config.name)

    def _meet(self, plan: Plan, worker: admin_pb2.ServiceEntry) -> None:
        """A worker is in the registry. If its process is a new one, it has nothing loaded."""
        before = plan.workers.get(worker.id)
        plan.workers[worker.id] = worker
        if before is not None and before.incarnation == worker.incarnation and before.pid == worker.pid:
            return
        same_process = before is not None and before.incarnation == worker.incarnation
        log.info("worker", id=worker.id, address=worker.address, known=same_process)
        if same_process:
            # Known from the document alone: this placement process is the newer one.
            self._chore(self._tidy(plan, worker))
            return
        for model in plan.of_worker(worker.id):
            self._stop_load(model.config.name)
            model.loading("loading")

    def _start_survey(self, plan: Plan, workers: Mapping[str, admin_pb2.ServiceEntry]) -> None:
        """Look for places for the models that have none, once for each set of worker processes."""
        fleet = frozenset((entry.id, entry.incarnation) for entry in workers.values())
        names = [name for name, model in plan.models.items() if not model.worker]
        waited = time.monotonic() - self._started
        enough = len(workers) >= self._settings.workers or waited > self._settings.worker_wait
        if self._survey or not names or not workers or not enough or fleet == self._judged:
            return
        self._survey = asyncio.create_task(self._place(plan, names, workers, fleet), name="survey")

    async def _place(
        self, plan: Plan, names: list[str], workers: Mapping[str, admin_pb2.ServiceEntry], fleet: Fleet
    ) -> None:
        try:
            outcome = await find_places(plan, names, list(workers.values()), self._calls)
        except ServiceError as error:
            log.warning("cannot ask the workers about models; trying again", error=str(error))
            await asyncio.sleep(BACKOFF)
        else:
            self._judged = fleet
            for name, place in outcome.items():
                model = plan.models[name]
                if isinstance(place, Refusal):
                    model.fail(place)
                    log.error("model refused", model=name, field=place.field, reason=place.reason)
                else:
                    model.assign(place.worker, place.shape)
                    log.info("model placed", model=name, worker=place.worker)
        finally:
            self._survey = None
            self._wake.set()

    async def _load(self, plan: Plan, name: str) -> None:
        model, worker = plan.models[name], plan.workers[plan.models[name].worker]
        log.info("loading", model=name, worker=worker.id)
        began = time.monotonic()
        try:
            shape = await self._calls.load(worker.address, model.config)
        except AlreadyExists:
            # Loaded under an older configuration.
            log.info("unloading what had this name", model=name, worker=worker.id)
            await self._unload(worker.address, name)
            await asyncio.sleep(BACKOFF)
        except (Unavailable, Cancelled) as error:
            model.loading(f"{worker.id}: {error}")
            await asyncio.sleep(BACKOFF)
        except ServiceError as error:
            model.fail(refusal(error))
            log.error("model failed", model=name, worker=worker.id, error=str(error))
        else:
            model.ready(shape)
            seconds = round(time.monotonic() - began, 3)
            log.info("model ready", model=name, worker=worker.id, seconds=seconds)
        finally:
            if self._loads.get(name) is asyncio.current_task():
                del self._loads[name]
            self._wake.set()

    def _stop_load(self, name: str) -> None:
        if task := self._loads.pop(name, None):
            task.cancel()
            self._chores.add(task)
            task.add_done_callback(self._chores.discard)

    async def _tidy(self, plan: Plan, worker: admin_pb2.ServiceEntry) -> None:
        """Unload what the configuration does not have any more."""
        try:
            info = await self._calls.info(worker.address)
        except ServiceError as error:
            log.warning("cannot ask the worker what it has", worker=worker.id, error=str(error))
            return
        wanted = {model.config.name for model in plan.of_worker(worker.id)}
        for loaded in info.models:
            if loaded.model not in wanted:
                log.info("unloading", model=loaded.model, worker=worker.id)
                await self._unload(worker.address, loaded.model)

    async def _unload(self, address: str, name: str) -> None:
        try:
            await self._calls.unload(address, name)
        except NotFound:
            pass
        except ServiceError as error:
            log.warning("cannot unload", model=name, error=str(error))

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _publish(self, stored: admin_pb2.Placement, wanted: admin_pb2.Placement) -> None:
        """Write `wanted` unless `stored`, which is what Redis has, says the same."""
        self._epoch = max(self._epoch, stored.epoch)
        wanted.epoch = stored.epoch
        if stored.epoch == 0 or wanted != stored:
            # Above every epoch of before, even if Redis has lost the document.
            wanted.epoch = self._epoch + 1
            if not await self._store.compare_and_set(stored.epoch, wanted):
                log.warning("somebody else wrote the placement", epoch=stored.epoch)
                return
            self._epoch = wanted.epoch
        self.placement = wanted
