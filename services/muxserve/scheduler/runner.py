"""`UnitRunner`: what a unit needs around it: the lease, the worker, the queues, the quotas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from muxserve.common.documents import QuotaStore
from muxserve.common.errors import Unavailable
from muxserve.common.queue import RequestQueue
from muxserve.scheduler.gateways import GatewayHub
from muxserve.scheduler.lease import LeaseLost, UnitLease, leased
from muxserve.scheduler.quota_sync import QuotaSync
from muxserve.scheduler.unit import Unit
from muxserve.scheduler.worker_link import WorkerLink
from muxserve.v1 import admin_pb2, inference_pb2

log = structlog.get_logger(__name__)

LOOKS = 3
"""Times that nothing was there to hand back until it is believed."""
BLOCK_MS = 500
"""Milliseconds that a pull waits in Redis: well below the client's timeout, for the sake of busy machines."""
CLAIM = 1.0
"""Seconds between looks for requests of dead schedulers, and for those that are to be handed back."""
INCOMING = 0.03
"""The same, and the longest pull, while another unit hands requests of the model over."""
AT_ONCE, AT_ONCE_PART = 2, 0.125
"""Requests that a busy unit takes at once of a model that others serve too: at least, and as a part of those
that it has, so that a large unit does not run dry."""
RELEASE_TIMEOUT = 0.5
"""Seconds for giving the lease back when the scheduler stops; else it runs out."""
RETRY = 0.2
"""Seconds between attempts while Redis is away."""

DRAINING = inference_pb2.MODEL_STATE_DRAINING

Peers = Mapping[str, Mapping[str, inference_pb2.ModelState.ValueType]]
"""By model: the other units that have it, and its state there; those where it failed are left out."""


@dataclass(frozen=True, slots=True)
class Intake:
    """The task that takes a model's requests from its queue, or hands them back."""

    task: asyncio.Task[None]
    leaves: bool
    """Whether it hands back."""
    incoming: bool
    """Whether another unit hands over."""


class UnitRunner:
    """Runs one unit whenever its lease is to be had. Consumers of the queues are units: a unit whose lease
    has run out is dead, and a new holder of its lease finds the old one's requests under its own name."""

    def __init__(
        self,
        make_unit: Callable[[], Unit],
        scheduler_id: str,
        redis: Redis,
        queue: RequestQueue,
        hub: GatewayHub,
    ) -> None:
        self.unit = make_unit()
        self._make_unit = make_unit
        self._scheduler_id = scheduler_id
        self._redis = redis
        self._queue = queue
        self._hub = hub
        self._lease = UnitLease(redis, self.unit.name, scheduler_id)
        self._placed = admin_pb2.Unit()
        self._peers: Peers = {}
        self._link = WorkerLink(self.unit, scheduler_id)
        self._intakes: dict[str, Intake] = {}
        self._rooms: dict[str, asyncio.Event] = {}
        self._group: asyncio.TaskGroup | None = None
        self.leased = False
        """Whether this scheduler runs the unit."""

    def place(self, unit: admin_pb2.Unit, peers: Peers) -> None:
        """Take the unit's part of a new placement."""
        self._placed, self._peers = unit, peers
        self._apply()

    async def run(self) -> None:
        """Run until cancelled; the lease is released then."""
        while True:
            epoch = await self._lease.acquire()
            log.info("unit leased", unit=self.unit.name, epoch=epoch)
            try:
                await self._run_leased(epoch)
            except* LeaseLost:
                log.warning("unit lost to another scheduler", unit=self.unit.name, epoch=epoch)
            finally:
                with suppress(Unavailable, TimeoutError):
                    async with asyncio.timeout(RELEASE_TIMEOUT):
                        await self._lease.release(epoch)

    async def _run_leased(self, epoch: int) -> None:
        self.unit = self._make_unit()
        self.unit.on_change = self._open_intakes
        self._link = WorkerLink(self.unit, self._scheduler_id)
        self._hub.add(self.unit)
        self.leased = True
        quotas = QuotaSync(self.unit, QuotaStore(self._redis))
        try:
            async with asyncio.TaskGroup() as self._group:
                self._apply()
                with suppress(Unavailable):
                    await quotas.sync()
                self._group.create_task(self._lease.keep(epoch))
                self._group.create_task(self._link.run(epoch))
                self._group.create_task(quotas.run())
                await self.unit.broken
        finally:
            self.leased = False
            self._group = None
            self._intakes.clear()
            self.unit.abandon()
            self._hub.remove(self.unit)

    def _apply(self) -> None:
        """Make unit, link and intakes follow the placement."""
        if self._group is None:
            return
        self._link.move(self._placed.worker_address)
        self.unit.place(self._placed, self._peers)
        for model in self._intakes.keys() - set(self.unit.models):
            self._intakes.pop(model).task.cancel()
        for model in self.unit.models:
            leaves, incoming = self.unit.leaves(model), DRAINING in self._peers.get(model, {}).values()
            if (intake := self._intakes.get(model)) is not None:
                if (intake.leaves, intake.incoming) == (leaves, incoming):
                    continue
                # What a pull that is cut off has taken is found by the next claim, or handed back.
                intake.task.cancel()
            self._rooms[model] = asyncio.Event()
            work = self._hand_back(model) if leaves else self._intake(model, incoming)
            task = self._group.create_task(work, name=f"intake {model}")
            self._intakes[model] = Intake(task, leaves, incoming)

    def _open_intakes(self) -> None:
        """Let intakes pull whose models have room, and hand back what is to be."""
        for model in self._intakes:
            room = self._rooms[model]
            if self.unit.room(model) or model in self.unit.handed_back:
                room.set()
            else:
                room.clear()

    async def _hand_back(self, model: str) -> None:
        """Hand back what is this unit's of a model that leaves, and what it has lost sight of: what a pull
        that was cut off had taken, which may show up a little later."""
        away, looks = False, 0
        while True:
            self.unit.handed_back.discard(model)
            self._rooms[model].clear()
            try:
                count = await self._queue.release(model, self.unit.name, self.unit.known(model))
            except Unavailable as error:
                if not away:
                    log.warning("nothing is handed back", unit=self.unit.name, model=model, error=str(error))
                away = True
                await asyncio.sleep(RETRY)
                continue
            away, looks = False, 0 if count else looks + 1
            if count:
                log.info("requests handed back", unit=self.unit.name, model=model, count=count)
            with suppress(TimeoutError):
                async with asyncio.timeout(CLAIM if looks < LOOKS else None):
                    await self._rooms[model].wait()

    async def _intake(self, model: str, incoming: bool) -> None:
        """Pull and claim for one model, one after the other: a claim has to know what the last pull got.
        `incoming`: others hand requests over, which should not wait."""
        loop = asyncio.get_running_loop()
        claim_at, away = loop.time(), False
        pause, block = (INCOMING, round(1000 * INCOMING)) if incoming else (CLAIM, BLOCK_MS)
        while True:
            if not self.unit.serves(model):
                self._rooms[model].clear()
                await self._rooms[model].wait()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(claim_at):
                    await self._rooms[model].wait()
            try:
                if loop.time() >= claim_at:
                    await self._claim(model)
                    claim_at = loop.time() + pause
                elif room := self.unit.room(model):
                    yielded = 0.0 if incoming else self.unit.yields(model)
                    if yielded:
                        await asyncio.sleep(yielded)
                    # What comes while a unit that is busy waits here would be its own at once.
                    few = max(AT_ONCE, int(AT_ONCE_PART * self.unit.size))
                    wanted, wait = (min(room, few), 0) if yielded else (room, block)
                    for delivery in await self._queue.pull({model: wanted}, self.unit.name, wait):
                        self.unit.deliver(delivery)
                else:
                    self._rooms[model].clear()
                away = False
            except Unavailable as error:
                if not away:
                    log.warning("nothing is pulled", unit=self.unit.name, model=model, error=str(error))
                away = True
                await asyncio.sleep(RETRY)

    async def _claim(self, model: str) -> None:
        """Take over requests that were handed back, whose unit nobody runs or does not have the model any
        more, and those that this one has lost sight of."""
        live = await leased(self._redis, self._peers.get(model, ())) | {self.unit.name}
        known = self.unit.known(model)
        for delivery in await self._queue.claim([model], self.unit.name, live, known):
            log.info("request claimed", unit=self.unit.name, request=delivery.request.request_id)
            self.unit.deliver(delivery)
