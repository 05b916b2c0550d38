"""`Watch`: reads the counters that traffic and speeds follow from; nothing is added to a request's way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import structlog
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import ServiceError
from muxserve.common.registry import Registry
from muxserve.common.rpc import channel
from muxserve.common.store import redis_errors
from muxserve.placement import advisor_view as view
from muxserve.placement.advisor_situation import Served, Worker
from muxserve.placement.advisor_speeds import Speeds
from muxserve.placement.traffic import Lengths, Traffic
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2

log = structlog.get_logger(__name__)

ASK_TIMEOUT = 1.5
"""Seconds in which a scheduler or a worker has to answer."""
INFOS = 10.0
"""Seconds for which what a worker said it is is believed."""


class Watch:
    """What is known of traffic and workers."""

    def __init__(self, redis: Redis, registry: Registry, calls: WorkerCalls, traffic: Traffic) -> None:
        self._redis: Any = redis
        self._registry = registry
        self._calls = calls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._infos: dict[str, tuple[float, worker_pb2.WorkerInfo]] = {}
        """By worker: when it was asked, and its answer."""
        self._waiting: dict[str, int] = {}
        self._speeds = Speeds()
        self.traffic = traffic

    def workers(self, placement: admin_pb2.Placement) -> list[Worker]:
        """The workers of `placement`, as they said they are."""
        infos = {worker: info for worker, (_, info) in self._infos.items()}
        return view.workers(placement, infos, self._speeds)

    def models(self, placement: admin_pb2.Placement, rest: float, believe: bool = False) -> list[Served]:
        """The models of `placement` with their traffic. `believe`: what may be a burst is the new rate."""
        now_ms = round(time.time() * 1000)
        traffic = self.traffic.believing() if believe else self.traffic
        return view.models(placement, traffic, self._waiting, now_ms, rest)

    async def look(self, placement: admin_pb2.Placement) -> None:
        """Read everything once. Raises Unavailable while Redis is away."""
        names = sorted({placed.config.name for unit in placement.units for placed in unit.models})
        await self._read_workers(placement)
        waiting = await self._read_queues(names)
        for entry in await self._registry.list("scheduler"):
            try:
                answer = await self._units(entry.address)
            except grpc.aio.AioRpcError as error:
                log.debug("a scheduler does not answer", id=entry.id, error=error.details())
                continue
            self._count(placement, answer, entry.incarnation, waiting)
        self._waiting = dict(waiting)

    async def close(self) -> None:
        """Close the channels to schedulers."""
        for each in self._channels.values():
            await each.close()

    async def _read_queues(self, names: Sequence[str]) -> Counter[str]:
        """Tell `traffic` what has arrived; requests that no scheduler has, by model."""
        with redis_errors("reading what has arrived"):
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.xinfo_stream(keys.queue(name))
                    pipe.xinfo_groups(keys.queue(name))
                answers = await pipe.execute(raise_on_error=False)
        waiting: Counter[str] = Counter()
        now = time.monotonic()
        for name, stream, groups in zip(names, answers[::2], answers[1::2], strict=True):
            if isinstance(stream, Exception):  # there is no such stream: nothing was ever asked of it
                self.traffic.arrivals(name, now, 0)
                continue
            self.traffic.arrivals(name, now, int(stream["entries-added"]))
            pending = 0 if isinstance(groups, Exception) else sum(int(group["pending"]) for group in groups)
            waiting[name] = max(0, int(stream["length"]) - pending)
        return waiting

    def _count(
        self,
        placement: admin_pb2.Placement,
        answer: scheduler_pb2.GetUnitsResponse,
        source: str,
        waiting: Counter[str],
    ) -> None:
        units = {unit.unit: unit for unit in placement.units}
        now = time.monotonic()
        for unit in answer.units:
            placed = units.get(unit.unit)
            known = self._infos.get(placed.worker_id) if placed is not None else None
            shapes = {m.config.name: m.shape for m in placed.models} if placed is not None else {}
            for model in unit.models:
                waiting[model.model] += model.waiting
                counters = Lengths(
                    model.finished_requests, model.finished_prompt_tokens, model.finished_output_tokens
                )
                self.traffic.lengths(model.model, f"{source}/{unit.unit}", now, counters)
                shape = shapes.get(model.model)
                if placed is None or known is None or shape is None or not shape.layers:
                    continue
                self._speeds.observe(
                    placed.worker_id,
                    known[1].device,
                    known[1].compute_units,
                    view.footprint(shape),
                    source,
                    model,
                )

    async def _read_workers(self, placement: admin_pb2.Placement) -> None:
        """Ask the workers that were not asked for a while what they are."""
        now = time.monotonic()
        units = {unit.worker_id: unit for unit in placement.units}
        self._infos = {worker: known for worker, known in self._infos.items() if worker in units}
        due = [unit for worker, unit in units.items() if now - self._infos.get(worker, (-INFOS,))[0] >= INFOS]
        answers = await asyncio.gather(
            *(self._calls.info(unit.worker_address) for unit in due), return_exceptions=True
        )
        for unit, answer in zip(due, answers, strict=True):
            if isinstance(answer, worker_pb2.WorkerInfo):
                self._infos[unit.worker_id] = (now, answer)
            elif isinstance(answer, ServiceError):
                self._infos.pop(unit.worker_id, None)
            else:
                raise answer

    async def _units(self, address: str) -> scheduler_pb2.GetUnitsResponse:
        if address not in self._channels:
            self._channels[address] = channel(address)
        stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channels[address])
        return await stub.GetUnits(scheduler_pb2.GetUnitsRequest(), timeout=ASK_TIMEOUT)
