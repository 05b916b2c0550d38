"""AdminService: what operators ask placement."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc
import structlog

from muxserve.common.documents import QuotaStore
from muxserve.common.errors import Aborted, InvalidArgument, NotFound, ServiceError, Unavailable
from muxserve.common.registry import Registry
from muxserve.common.rpc import channel
from muxserve.placement.drains import Drains
from muxserve.placement.migration_service import MigrationServicer, Planner
from muxserve.placement.migrations import Migrations
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2

log = structlog.get_logger(__name__)

KINDS = ("gateway", "placement", "scheduler", "worker")
ASK_TIMEOUT = 1.5
"""Seconds in which a service has to say how it is, to be in the status."""

CAS_ATTEMPTS = 8

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(MigrationServicer):
    """AdminService over the placement in force, the registry and the quotas."""

    def __init__(
        self,
        placement: Callable[[], admin_pb2.Placement],
        registry: Registry,
        quotas: QuotaStore,
        calls: WorkerCalls,
        migrations: Migrations,
        drains: Drains,
        planner: Planner,
    ) -> None:
        super().__init__(migrations, drains, planner, calls)
        self._placement = placement
        self._registry = registry
        self._quotas = quotas
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        services = await self._services()
        units, workers = await asyncio.gather(
            _all(self._units(entry.address) for entry in services if entry.kind == "scheduler"),
            _all(self._calls.info(entry.address) for entry in services if entry.kind == "worker"),
        )
        return admin_pb2.GetStatusResponse(
            placement=self._placement(),
            units=[unit for each in units for unit in each.units],
            workers=workers,
            services=services,
        )

    async def GetPlacement(
        self, request: admin_pb2.GetPlacementRequest, context: Context
    ) -> admin_pb2.GetPlacementResponse:
        return admin_pb2.GetPlacementResponse(placement=self._placement())

    async def GetQuotas(
        self, request: admin_pb2.GetQuotasRequest, context: Context
    ) -> admin_pb2.GetQuotasResponse:
        unit = self._unit(request.unit)
        quotas, history, use = await asyncio.gather(
            self._quotas.read(unit.unit), self._quotas.history(unit.unit), self._use(unit)
        )
        return admin_pb2.GetQuotasResponse(quotas=quotas, history=history, use=use)

    async def SetQuota(
        self, request: admin_pb2.SetQuotaRequest, context: Context
    ) -> admin_pb2.SetQuotaResponse:
        unit = self._unit(request.unit)
        await self._check_quota(unit, request)
        for _ in range(CAS_ATTEMPTS):
            quotas = await self._quotas.read(unit.unit)
            expected = quotas.revision
            if request.expected_revision not in (0, expected):
                raise Aborted(f"the revision is {expected}, not {request.expected_revision}")
            quotas.revision += 1
            quotas.blocks[request.model] = request.blocks
            if await self._quotas.compare_and_set(quotas, expected, "admin", time.time()):
                return admin_pb2.SetQuotaResponse(quotas=quotas)
        raise Aborted("the quotas change too fast; try again")

    async def close(self) -> None:
        """Close the channels to schedulers."""
        for each in self._channels.values():
            await each.close()

    def _unit(self, name: str) -> admin_pb2.Unit:
        """The unit called `name`, or the only one. Raises InvalidArgument, NotFound."""
        units = {unit.unit: unit for unit in self._placement().units}
        known = ", ".join(units) or "none"
        if not name:
            if len(units) != 1:
                raise InvalidArgument("unit", f"required, since there are {len(units)} units: {known}")
            return next(iter(units.values()))
        if name not in units:
            raise NotFound("unit", name, f"units: {known}")
        return units[name]

    async def _use(self, unit: admin_pb2.Unit) -> list[worker_pb2.ModelBlocks]:
        """What the unit's models have of the pool; nothing if the worker does not answer."""
        infos = await _all([self._calls.info(unit.worker_address)])
        return [model for info in infos for model in info.pool.models]

    async def _check_quota(self, unit: admin_pb2.Unit, request: admin_pb2.SetQuotaRequest) -> None:
        names = [model.config.name for model in unit.models]
        if not request.model:
            raise InvalidArgument("model", "required")
        if request.model not in names:
            raise NotFound("model", request.model, f"models of {unit.unit}: {', '.join(names)}")
        total = (await self._calls.info(unit.worker_address)).pool.total_blocks
        if request.blocks > total:
            raise InvalidArgument("blocks", f"{request.blocks} is more than the arena's {total} blocks")

    async def _services(self) -> list[admin_pb2.ServiceEntry]:
        """What the registry has; while Redis is away, what it had."""
        try:
            found = await asyncio.gather(*(self._registry.list(kind) for kind in KINDS))
        except Unavailable:
            found = [list(self._registry.known(kind)) for kind in KINDS]
        return [entry for entries in found for entry in entries]

    async def _units(self, address: str) -> scheduler_pb2.GetUnitsResponse:
        if address not in self._channels:
            self._channels[address] = channel(address)
        stub = scheduler_pb2_grpc.SchedulerServiceStub(self._channels[address])
        return await stub.GetUnits(scheduler_pb2.GetUnitsRequest(), timeout=ASK_TIMEOUT)


async def _all(questions: Iterable[Awaitable[T]]) -> list[T]:
    """The answers of those that answer. A call can be cancelled with the connection that it is on."""
    answers = await asyncio.gather(*questions, return_exceptions=True)
    result = []
    for answer in answers:
        if isinstance(answer, ServiceError | grpc.aio.AioRpcError | asyncio.CancelledError):
            log.debug("a service does not answer", error=str(answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            result.append(answer)
    return result
