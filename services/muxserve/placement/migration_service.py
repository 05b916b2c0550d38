"""AdminService's part that moves models: conversions, and who is asked."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc

from muxserve.common.errors import InvalidArgument, ServiceError
from muxserve.placement.drains import Drains
from muxserve.placement.migrations import Migrations, Order
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, admin_pb2_grpc

AUTHOR = "admin"

Context = grpc.aio.ServicerContext[Any, Any]
Planner = Callable[[], Awaitable[admin_pb2.PlanResponse]]


class MigrationServicer(admin_pb2_grpc.AdminServiceServicer):
    """Plans, moves, loads, unloads, pins and drains."""

    def __init__(self, migrations: Migrations, drains: Drains, planner: Planner, calls: WorkerCalls) -> None:
        self._migrations = migrations
        self._drains = drains
        self._planner = planner
        self._calls = calls

    async def Plan(self, request: admin_pb2.PlanRequest, context: Context) -> admin_pb2.PlanResponse:
        return await self._planner()

    async def Rebalance(
        self, request: admin_pb2.RebalanceRequest, context: Context
    ) -> AsyncIterator[admin_pb2.RebalanceResponse]:
        drain_seconds = _drain_seconds(request)
        if request.moves:
            orders, reason = self._asked(request.moves), "asked for"
        else:
            plan = await self._planner()
            moves = plan.moves if plan.worthwhile else ()
            orders = [Order(move.model, move.source_worker, move.target_worker) for move in moves]
            reason = plan.reason
        ids = await self._migrations.start(orders, AUTHOR, reason, drain_seconds)
        async for event in self._events(ids):
            yield admin_pb2.RebalanceResponse(event=event)

    async def LoadModel(
        self, request: admin_pb2.AdminServiceLoadModelRequest, context: Context
    ) -> AsyncIterator[admin_pb2.AdminServiceLoadModelResponse]:
        self._migrations.model(request.model)
        ids = []
        if not self._migrations.is_loaded(request.model, request.worker):
            ids = await self._migrations.start(
                [Order(request.model, "", request.worker)], AUTHOR, "asked for"
            )
        async for event in self._events(ids):
            yield admin_pb2.AdminServiceLoadModelResponse(event=event)

    async def UnloadModel(
        self, request: admin_pb2.AdminServiceUnloadModelRequest, context: Context
    ) -> AsyncIterator[admin_pb2.AdminServiceUnloadModelResponse]:
        drain_seconds = _drain_seconds(request)
        worker = self._migrations.source(request.model, request.worker, "worker")
        self._migrations.check_unload(request.model, worker)
        orders = [Order(request.model, worker, "")]
        ids = await self._migrations.start(orders, AUTHOR, "asked for", drain_seconds)
        async for event in self._events(ids):
            yield admin_pb2.AdminServiceUnloadModelResponse(event=event)

    async def SetPinned(
        self, request: admin_pb2.SetPinnedRequest, context: Context
    ) -> admin_pb2.SetPinnedResponse:
        epoch = await self._migrations.pin(request.model, request.pinned)
        return admin_pb2.SetPinnedResponse(epoch=epoch)

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> AsyncIterator[admin_pb2.DrainResponse]:
        drain_seconds = _drain_seconds(request)
        if request.undo:
            await self._drains.undo(request.worker)
        else:
            await self._drains.start(request.worker, drain_seconds)
            ended = 0
            async for migration in self._drains.follow(request.worker):
                ended += migration.ended_unix_ms > 0
                left = self._drains.left(request.worker)
                event = admin_pb2.MigrationEvent(migration=migration, ended=ended, total=ended + left)
                held = await self._held(request.worker)
                yield admin_pb2.DrainResponse(event=event, held_blocks=held, models_left=left)
        yield admin_pb2.DrainResponse(
            held_blocks=await self._held(request.worker), models_left=self._drains.left(request.worker)
        )

    async def CancelMigration(
        self, request: admin_pb2.CancelMigrationRequest, context: Context
    ) -> admin_pb2.CancelMigrationResponse:
        return admin_pb2.CancelMigrationResponse(migration=await self._migrations.cancel(request.id))

    def _asked(self, moves: Iterable[admin_pb2.Move]) -> list[Order]:
        orders = []
        for number, move in enumerate(moves):
            field = f"moves[{number}]"
            source = self._migrations.source(move.model, move.source_worker, f"{field}.source_worker")
            target = self._migrations.worker(move.target_worker, f"{field}.target_worker")
            orders.append(Order(move.model, source, target))
        return orders

    async def _events(self, ids: list[str]) -> AsyncIterator[admin_pb2.MigrationEvent]:
        ended = 0
        async for migration in self._migrations.follow(ids):
            ended += migration.ended_unix_ms > 0
            yield admin_pb2.MigrationEvent(migration=migration, ended=ended, total=len(ids))

    async def _held(self, worker: str) -> int:
        """Blocks that sequences hold there; 0 if it does not answer."""
        entry = self._migrations.plan.workers.get(worker)
        if entry is None:
            return 0
        try:
            pool = (await self._calls.info(entry.address)).pool
        except ServiceError:
            return 0
        return pool.total_blocks - pool.free_blocks - pool.cached_blocks


def _drain_seconds(
    request: admin_pb2.RebalanceRequest | admin_pb2.AdminServiceUnloadModelRequest | admin_pb2.DrainRequest,
) -> float | None:
    """None: as configured. Raises InvalidArgument."""
    if not request.HasField("drain_seconds"):
        return None
    if not (math.isfinite(request.drain_seconds) and request.drain_seconds >= 0):
        raise InvalidArgument("drain_seconds", f"{request.drain_seconds} is not a number of seconds")
    return request.drain_seconds
