"""`UnitRunner`: what a unit needs around it: the lease, the worker, the queues, the quotas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

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
from muxserve.v1 import admin_pb2

log = structlog.get_logger(__name__)

BLOCK_MS = 500
"""Milliseconds that a pull waits in Redis: well below the client's timeout, for the sake of busy machines."""
CLAIM = 1.0
"""Seconds between looks for requests of dead schedulers."""
RELEASE_TIMEOUT = 0.5
"""Seconds for giving the lease back when the scheduler stops; else it runs out."""
RETRY = 0.2
"""Seconds between attempts while Redis is away."""


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
        self._elsewhere: set[str] = set()
        self._units: set[str] = {self.unit.name}
        self._link = WorkerLink(self.unit, scheduler_id)
        self._intakes: dict[str, asyncio.Task[None]] = {}
        self._rooms: dict[str, asyncio.Event] = {}
        self._group: asyncio.TaskGroup | None = None
        self.leased = False
        """Whether this scheduler runs the unit."""

    def place(self, unit: admin_pb2.Unit, elsewhere: set[str], units: set[str]) -> None:
        """Take the unit's part of a new placement. `elsewhere`: models of other units; `units`: all names."""
        self._placed, self._elsewhere, self._units = unit, elsewhere, units
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
        self.unit.place(self._placed, self._elsewhere)
        for model in self._intakes.keys() - set(self.unit.models):
            self._intakes.pop(model).cancel()
        for model in set(self.unit.models) - self._intakes.keys():
            self._rooms[model] = asyncio.Event()
            self._intakes[model] = self._group.create_task(self._intake(model), name=f"intake {model}")

    def _open_intakes(self) -> None:
        """Let intakes pull whose models have room."""
        for model in self._intakes:
            room = self._rooms[model]
            if self.unit.room(model):
                room.set()
            else:
                room.clear()

    async def _intake(self, model: str) -> None:
        """Pull and claim for one model, one after the other: a claim has to know what the last pull got."""
        loop = asyncio.get_running_loop()
        claim_at, away = loop.time(), False
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
                    claim_at = loop.time() + CLAIM
                elif room := self.unit.room(model):
                    for delivery in await self._queue.pull({model: room}, self.unit.name, BLOCK_MS):
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
        """Take over requests whose unit nobody runs, and those that this one has lost sight of."""
        live = await leased(self._redis, self._units) | {self.unit.name}
        known = self.unit.known(model)
        for delivery in await self._queue.claim([model], self.unit.name, live, known):
            log.info("request claimed", unit=self.unit.name, request=delivery.request.request_id)
            self.unit.deliver(delivery)
