"""`Scheduler`: the units of the placement, each with its runner."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog
from redis.asyncio import Redis

from muxserve.common.documents import PlacementStore
from muxserve.common.errors import Unavailable
from muxserve.common.queue import RequestQueue
from muxserve.scheduler import policy
from muxserve.scheduler.acks import Acknowledger
from muxserve.scheduler.gateways import GatewayHub
from muxserve.scheduler.runner import Peers, UnitRunner
from muxserve.scheduler.settings import SchedulerSettings
from muxserve.scheduler.unit import Unit
from muxserve.v1 import admin_pb2, inference_pb2, scheduler_pb2

log = structlog.get_logger(__name__)

FLUSH_TIMEOUT = 1.0
"""Seconds for the last acknowledgements when the scheduler stops."""


class Scheduler:
    """Follows the placement. `run` ends when it is cancelled, or with the error of a task that should not
    fail."""

    def __init__(self, settings: SchedulerSettings, redis: Redis) -> None:
        self.id = settings.id
        self.hub = GatewayHub()
        self._settings = settings
        self._redis = redis
        self._queue = RequestQueue(redis)
        self._acks = Acknowledger(self._queue)
        self._runners: dict[str, UnitRunner] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def status(self) -> list[scheduler_pb2.UnitStatus]:
        """Of the units that run here, by name."""
        return [r.unit.status() for _, r in sorted(self._runners.items()) if r.leased]

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Run what the placement says. `on_ready` is called when the first one was read."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._acks.run(), name="acknowledger")
                async for placement in PlacementStore(self._redis).watch():
                    self._follow(placement, group)
                    on_ready()
        finally:
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await self._acks.flush()

    def _follow(self, placement: admin_pb2.Placement, group: asyncio.TaskGroup) -> None:
        units = {unit.unit: unit for unit in placement.units}
        places: dict[str, dict[str, inference_pb2.ModelState.ValueType]] = defaultdict(dict)
        for name, unit in units.items():
            for model in unit.models:
                if model.state != inference_pb2.MODEL_STATE_FAILED:
                    places[model.config.name][name] = model.state
        for name in self._runners.keys() - units.keys():
            log.info("unit is gone", unit=name)
            self._runners.pop(name).place(admin_pb2.Unit(), places)
            self._tasks.pop(name).cancel()
        for name, unit in units.items():
            if name not in self._runners:
                make = partial(self._make_unit, name)
                runner = UnitRunner(make, self.id, self._redis, self._queue, self.hub)
                self._runners[name] = runner
                self._tasks[name] = group.create_task(runner.run(), name=f"unit {name}")
            self._runners[name].place(unit, _others(places, name))

    def _make_unit(self, name: str) -> Unit:
        made = policy.create(self._settings.policy, self._settings.policy_options())
        return Unit(name, self._settings.policy, made, self.hub, self._acks)


def _others(places: Peers, unit: str) -> Peers:
    """`places` without those in `unit`."""
    others = {model: {u: s for u, s in units.items() if u != unit} for model, units in places.items()}
    return {model: units for model, units in others.items() if units}
