"""A scheduler in this process with a fake worker and a fake gateway, over a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.documents import PlacementStore
from muxserve.common.queue import RequestQueue
from muxserve.common.rpc import RpcServer, channel
from muxserve.common.store import connect
from muxserve.scheduler.scheduler import Scheduler
from muxserve.scheduler.service import SERVICE, SchedulerServicer
from muxserve.scheduler.settings import SchedulerSettings
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.scheduler.fake_gateway import FakeGateway
from tests.scheduler.fake_worker import FakeWorker
from tests.support.valkey import ValkeyProcess

READY = inference_pb2.MODEL_STATE_READY


@dataclass
class Running:
    """A scheduler that serves."""

    scheduler: Scheduler
    address: str

    async def status(self) -> scheduler_pb2.UnitStatus:
        """Of its only unit, over gRPC."""
        async with channel(self.address) as connection:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            response = await stub.GetUnits(scheduler_pb2.GetUnitsRequest())
        assert response.scheduler_id == self.scheduler.id
        (unit,) = response.units
        return unit


class Setting:
    """What tests put together. Everything is taken down at the end."""

    def __init__(self, valkey: ValkeyProcess, redis: Redis, stack: AsyncExitStack) -> None:
        self.valkey, self.redis, self._stack = valkey, redis, stack
        self.queue = RequestQueue(redis)
        self.epoch = 0

    async def worker(self, blocks: int, shapes: dict[str, common_pb2.ModelShape], **more: Any) -> FakeWorker:
        worker = FakeWorker(blocks, shapes, **more)
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        return worker

    async def place(self, worker: FakeWorker, models: list[str] | None = None, **config: Any) -> None:
        """Write a placement with one unit: that worker and these models (all of them)."""
        placed = [
            admin_pb2.PlacedModel(
                config=common_pb2.ModelConfig(name=name, path="x", **config),
                state=READY,
                shape=worker.shapes[name],
            )
            for name in (worker.shapes if models is None else models)
        ]
        unit = admin_pb2.Unit(
            unit="unit-0", worker_id="worker-0", worker_address=worker.address, models=placed
        )
        self.epoch += 1
        placement = admin_pb2.Placement(epoch=self.epoch, units=[unit])
        assert await PlacementStore(self.redis).compare_and_set(self.epoch - 1, placement)

    async def scheduler(self, name: str = "scheduler-0", **settings: Any) -> Running:
        return await self._stack.enter_async_context(running(self.valkey.url, name, **settings))

    async def gateway(self, address: str, name: str = "gateway-x") -> FakeGateway:
        gateway = FakeGateway(self.queue, name)
        await gateway.attach(address)
        self._stack.push_async_callback(gateway.detach)
        return gateway

    async def queue_length(self, model: str) -> int:
        """Entries that are not acknowledged."""
        return int(await self.redis.xlen(keys.queue(model)))


@asynccontextmanager
async def running(url: str, name: str, **settings: Any) -> AsyncIterator[Running]:
    """A scheduler on a port of its own."""
    redis = connect(url)
    scheduler = Scheduler(SchedulerSettings(id=name, redis_url=url, **settings), redis)
    server = RpcServer("127.0.0.1:0")
    server.add(
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, SchedulerServicer(scheduler), SERVICE
    )
    address = await server.start()
    task = asyncio.create_task(scheduler.run(lambda: None))
    try:
        yield Running(scheduler, address)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.stop(0)
        await redis.aclose()


@pytest.fixture
async def setting(valkey: ValkeyProcess, redis_client: Redis) -> AsyncIterator[Setting]:
    async with AsyncExitStack() as stack:
        yield Setting(valkey, redis_client, stack)


async def eventually(check: Callable[[], Awaitable[bool] | bool], seconds: float = 5.0) -> None:
    """Wait until `check` holds."""
    async with asyncio.timeout(seconds):
        while True:
            result = check()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.01)
