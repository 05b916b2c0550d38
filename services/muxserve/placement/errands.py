"""`Errands`: the calls that make workers have what the placement document says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from muxserve.common.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    NotFound,
    Overloaded,
    ServiceError,
    Unavailable,
)
from muxserve.placement.document import ASLEEP, DRAINING, LOADING, Place, Plan, PlannedModel
from muxserve.placement.migration import leaving
from muxserve.placement.survey import refusal
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

BACKOFF = 0.5
"""Seconds after which a call that failed for a passing reason is made again."""

BUSY = 0.1
"""Seconds after which a model is tried to be unloaded again that had open sequences."""

Entry = admin_pb2.ServiceEntry


@dataclass(frozen=True, slots=True)
class Errand:
    """A call that goes on."""

    kind: Literal["load", "unload"]
    task: asyncio.Task[None]


class Errands:
    """One call at a time for each place. They change the plan when they end, and call `wake`. Each names the
    epoch of the document that it follows from; a worker that has heard of a newer one refuses it."""

    def __init__(self, calls: WorkerCalls, wake: Callable[[], None], heard: Callable[[int], None]) -> None:
        """`heard` is called with the highest epoch that a worker has heard of, when it is told of one."""
        self._calls = calls
        self._wake = wake
        self._heard = heard
        self._errands: dict[tuple[str, str], Errand] = {}
        """By model and worker."""
        self._chores: set[asyncio.Task[None]] = set()
        self._meetings: dict[str, asyncio.Task[None]] = {}
        """By worker."""

    def follow(self, plan: Plan, workers: Mapping[str, Entry], epoch: int) -> None:
        """Have done what `plan` wants, which is published as `epoch`, on `workers`: those that are there."""
        for model, place in plan.places():
            entry = workers.get(place.worker)
            if entry is None:
                continue
            errand = self._errands.get((model.name, place.worker))
            going = None if errand is None else errand.kind
            gone = place.state == ASLEEP or leaving(plan, model, place)
            if place.state == LOADING and going is None:
                self._start("load", model, place, self._load(model, place, entry, epoch))
            elif gone and place.occupied and going != "unload":
                self.stop(model.name, place.worker)  # unloading gives a load up
                self._start("unload", model, place, self._unload(model, place, entry, epoch))

    def stop(self, model: str, worker: str) -> None:
        """Give up a call. The worker may go on with it."""
        if (errand := self._errands.pop((model, worker), None)) is not None:
            errand.task.cancel()
            self._keep(errand.task)

    def stop_all(self) -> None:
        """Give up all calls."""
        for model, worker in list(self._errands):
            self.stop(model, worker)
        for worker in list(self._meetings):
            self.leave(worker)

    def meet(self, plan: Plan, worker: Entry, epoch: int) -> None:
        """Tell `worker`, beside all else, of the document, and have unloaded what it has and should not
        have."""
        self.leave(worker.id)
        meeting = asyncio.create_task(self._meet(plan, worker, epoch), name=f"meet {worker.id}")
        self._meetings[worker.id] = meeting
        self._keep(meeting)

    def leave(self, worker: str) -> None:
        """Give up meeting it."""
        if (meeting := self._meetings.pop(worker, None)) is not None:
            meeting.cancel()

    async def close(self) -> None:
        """Give up everything."""
        self.stop_all()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)

    def _start(
        self,
        kind: Literal["load", "unload"],
        model: PlannedModel,
        place: Place,
        work: Coroutine[Any, Any, None],
    ) -> None:
        key = (model.name, place.worker)
        task = asyncio.create_task(work, name=f"{kind} {model.name} on {place.worker}")
        errand = self._errands[key] = Errand(kind, task)

        def ended(task: asyncio.Task[None]) -> None:
            if self._errands.get(key) is errand:
                del self._errands[key]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("an errand failed", task=task.get_name(), exc_info=error)
            self._wake()

        task.add_done_callback(ended)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _load(self, model: PlannedModel, place: Place, worker: Entry, epoch: int) -> None:
        name = model.name
        log.info("loading", model=name, worker=worker.id)
        began = time.monotonic()
        try:
            loaded = await self._calls.load(worker.address, model.config, epoch)
        except AlreadyExists:
            # Loaded under an older configuration.
            log.info("unloading what had this name", model=name, worker=worker.id)
            await self._gone(worker, name, epoch)
            await asyncio.sleep(BACKOFF)
        except (Unavailable, Cancelled, Aborted) as error:
            if place.state == LOADING and not place.woken:  # requests wait for one that was woken
                place.loading(f"{worker.id}: {error}")
            await asyncio.sleep(BACKOFF)
        except Overloaded as error:
            if not place.woken and place.state == LOADING:
                place.fail(refusal(error))
            log.error("no room for a model", model=name, worker=worker.id, error=str(error))
            await asyncio.sleep(BACKOFF)
            if place.woken:
                place.sleep()  # not before: it can be woken again, and would be at once
        except ServiceError as error:
            if place.state == LOADING:
                place.fail(refusal(error))
            log.error("model failed", model=name, worker=worker.id, error=str(error))
        else:
            if loaded.load_seconds:
                place.loads, place.load_seconds = place.loads + 1, round(loaded.load_seconds, 3)
            if place.state == LOADING:
                place.ready(loaded.shape)
            seconds = round(time.monotonic() - began, 3)
            log.info("model ready", model=name, worker=worker.id, seconds=seconds)

    async def _unload(self, model: PlannedModel, place: Place, worker: Entry, epoch: int) -> None:
        if await self._gone(worker, model.name, epoch):
            log.info("model unloaded", model=model.name, worker=worker.id)
            if place.state in (ASLEEP, DRAINING):
                place.occupied = False
        else:
            await asyncio.sleep(BUSY)

    async def _meet(self, plan: Plan, worker: Entry, epoch: int) -> None:
        """Returns when the worker knows of the document and has nothing that it should not have."""
        while True:
            try:
                self._heard(await self._calls.announce(worker.address, epoch))
                info = await self._calls.info(worker.address)
                break
            except ServiceError as error:
                log.warning("a worker does not answer", worker=worker.id, error=str(error))
                await asyncio.sleep(BACKOFF)
        wanted = {model.name for model, place in plan.of_worker(worker.id) if place.state != ASLEEP}
        for loaded in info.models:
            if loaded.model not in wanted:
                log.info("unloading", model=loaded.model, worker=worker.id)
                await self._gone(worker, loaded.model, epoch)

    async def _gone(self, worker: Entry, name: str, epoch: int) -> bool:
        """Whether it is gone."""
        try:
            await self._calls.unload(worker.address, name, epoch)
        except NotFound:
            return True
        except FailedPrecondition as error:
            log.debug("not unloaded yet", model=name, worker=worker.id, reason=str(error))
            return False
        except ServiceError as error:
            log.warning("cannot unload", model=name, worker=worker.id, error=str(error))
            return False
        return True
