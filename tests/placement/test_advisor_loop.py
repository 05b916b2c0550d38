"""The rebalancer over a real Valkey: what it reads, what it says, and what it has done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from muxserve.common.errors import FailedPrecondition
from muxserve.common.queue import RequestQueue
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.placement import advisor_loop
from muxserve.placement.advisor_loop import Rebalancer
from muxserve.placement.advisor_situation import Move
from muxserve.placement.advisor_watch import Watch
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.traffic import Traffic
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import (
    admin_pb2,
    common_pb2,
    inference_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
)
from tests.placement.peers import MIB, PeerWorker, eventually

READY, ASLEEP = inference_pb2.MODEL_STATE_READY, inference_pb2.MODEL_STATE_ASLEEP
SHAPE = common_pb2.ModelShape(
    dtype="bfloat16", layers=30, kv_heads=3, head_dim=64, weight_bytes=270 * MIB, context_length=2048
)


class PeerScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Says what it is told to say."""

    def __init__(self, units: Sequence[scheduler_pb2.UnitStatus]) -> None:
        self.units = units

    async def GetUnits(self, request: Any, context: Any) -> scheduler_pb2.GetUnitsResponse:
        return scheduler_pb2.GetUnitsResponse(units=self.units, scheduler_id="s")


class CpuWorker(PeerWorker):
    """One core, and room for three models."""

    async def GetInfo(
        self, request: worker_pb2.GetInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetInfoResponse:
        info = (await super().GetInfo(request, context)).info
        info.device, info.compute_units = "cpu", 1
        info.pool.total_blocks = 32768
        return worker_pb2.GetInfoResponse(info=info)


@asynccontextmanager
async def peers(redis: Redis, units: Sequence[scheduler_pb2.UnitStatus]) -> AsyncIterator[dict[str, str]]:
    """Addresses of two workers; a scheduler is in the registry."""
    servers, addresses = [], {}
    for name in ("a", "b"):
        server = RpcServer("127.0.0.1:0")
        worker = CpuWorker(name, 3 * 270)
        server.add(_add_worker, worker, "muxserve.v1.WorkerService")
        addresses[name] = await server.start()
        servers.append(server)
    server = RpcServer("127.0.0.1:0")
    server.add(
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
        PeerScheduler(units),
        "muxserve.v1.SchedulerService",
    )
    address = await server.start()
    try:
        async with Registry(redis).keep(entry_of_this_process("scheduler", "s", address)):
            yield addresses
    finally:
        for each in (*servers, server):
            await each.stop(0)


def _add_worker(servicer: Any, server: Any) -> None:
    from muxserve.v1 import worker_pb2_grpc

    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)


def placement(addresses: dict[str, str], **models: str) -> admin_pb2.Placement:
    """Each model READY on the workers named, one letter each; in capitals: ASLEEP."""
    units = []
    for worker, address in addresses.items():
        here = [
            admin_pb2.PlacedModel(
                config=common_pb2.ModelConfig(name=name),
                state=READY if worker in at else ASLEEP,
                shape=SHAPE,
            )
            for name, at in models.items()
            if worker in at.lower()
        ]
        units.append(
            admin_pb2.Unit(unit=f"unit-{worker}", worker_id=worker, worker_address=address, models=here)
        )
    return admin_pb2.Placement(epoch=1, units=units)


@asynccontextmanager
async def watching(redis: Redis, expected: dict[str, float]) -> AsyncIterator[Watch]:
    calls = WorkerCalls(load_timeout=10)
    watch = Watch(redis, Registry(redis), calls, Traffic(expected))
    try:
        yield watch
    finally:
        await watch.close()
        await calls.close()


def settings(**more: Any) -> PlacementSettings:
    return PlacementSettings(models=[{"name": "hot", "path": "x"}], **more)


def queued(model: str, number: int) -> scheduler_pb2.QueuedRequest:
    return scheduler_pb2.QueuedRequest(
        request_id=f"{model}-{number}", model=model, prompt_tokens=[1], max_tokens=1
    )


async def test_plan_says_what_is_known_of_traffic_and_what_would_be_moved(redis_client: Redis) -> None:
    status = scheduler_pb2.UnitModelStatus(
        model="hot",
        waiting=4,
        finished_requests=1000,
        finished_prompt_tokens=16_000,
        finished_output_tokens=40_000,
    )
    units = [scheduler_pb2.UnitStatus(unit="unit-a", models=[status])]
    queue = RequestQueue(redis_client)
    async with peers(redis_client, units) as addresses, watching(redis_client, {"hot": 9.0}) as watch:
        document = placement(addresses, hot="a", cold="a", other="b")
        moved: list[Move] = []
        rebalancer = Rebalancer(settings(), lambda: document, watch, lambda moves, _: moved.extend(moves))
        await rebalancer.plan()
        for number in range(3):
            await queue.admit(queued("hot", number), 100)
        plan = await rebalancer.plan()
    hot = next(each for each in plan.traffic if each.model == "hot")
    assert hot.waiting == 7, "three in the queue, four with the scheduler"
    assert hot.prompt_tokens == pytest.approx(16, rel=0.02)
    assert hot.output_tokens == pytest.approx(40, rel=0.02)
    assert plan.worthwhile
    assert [(move.model, move.source_worker, move.target_worker) for move in plan.moves] == [("hot", "", "b")]
    assert plan.gain > 0
    assert "hot" in plan.reason
    assert not moved, "a plan changes nothing"


async def test_what_is_worthwhile_is_done_once_and_not_while_something_is_under_way(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisor_loop, "LOOK", 0.02)
    monkeypatch.setattr(advisor_loop, "LEAST", 0.0)
    async with peers(redis_client, []) as addresses, watching(redis_client, {"hot": 9.0}) as watch:
        document = placement(addresses, hot="a", cold="a", other="b")
        begun: list[tuple[list[Move], str]] = []

        def start(moves: Sequence[Move], reason: str) -> None:
            begun.append((list(moves), reason))
            if len(begun) == 1:
                raise FailedPrecondition("somebody else was first")
            document.planned.add(model="hot", target_worker="b")

        rebalancer = Rebalancer(settings(rebalance_interval=0.05), lambda: document, watch, start)
        loop = asyncio.create_task(rebalancer.run())

        async def done() -> bool:
            return len(begun) >= 2

        try:
            await eventually(done)
            await asyncio.sleep(0.3)
        finally:
            loop.cancel()
        assert len(begun) == 2, "it tries again after an error, and not while migrations are planned"
        assert begun[1][0] == [Move("hot", "", "b")]


async def test_switched_off_it_watches_and_moves_nothing(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisor_loop, "LOOK", 0.02)
    monkeypatch.setattr(advisor_loop, "LEAST", 0.0)
    async with peers(redis_client, []) as addresses, watching(redis_client, {"hot": 9.0}) as watch:
        document = placement(addresses, hot="a", cold="a", other="b")
        begun: list[Sequence[Move]] = []
        rebalancer = Rebalancer(
            settings(rebalance="off", rebalance_interval=0.05),
            lambda: document,
            watch,
            lambda moves, _: begun.append(moves),
        )
        loop = asyncio.create_task(rebalancer.run())

        async def seen() -> bool:
            return watch.traffic.flow("hot").seconds > 0.2

        try:
            await eventually(seen)
        finally:
            loop.cancel()
        assert not begun
        assert (await rebalancer.plan()).worthwhile, "asked for, it says what it would do"


async def test_sleeping_places_and_workers_that_do_not_answer(redis_client: Redis) -> None:
    async with peers(redis_client, []) as addresses, watching(redis_client, {}) as watch:
        document = placement(addresses, hot="a", sleeper="B")
        document.units.add(unit="unit-c", worker_id="c", worker_address="127.0.0.1:1")
        await watch.look(document)
        assert [worker.id for worker in watch.workers(document)] == ["a", "b"]
        models = {model.name: model for model in watch.models(document, 0.0)}
    assert models["sleeper"].asleep == {"b"}
    assert models["sleeper"].loaded == frozenset()
    assert models["hot"].loaded == {"a"}
    assert models["hot"].kv_bytes == 2 * 30 * 3 * 64 * 2
