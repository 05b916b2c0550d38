"""A model that two units serve: its requests go to the one that has less to do."""

from __future__ import annotations

import asyncio

from muxserve.common.documents import PlacementStore
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2
from tests.scheduler.conftest import Setting, eventually
from tests.scheduler.fake_worker import shape

REQUESTS = 8
LOOKS = 5


async def test_a_busy_unit_leaves_requests_to_an_idle_one(setting: Setting) -> None:
    workers = [await setting.worker(400, {name: shape() for name in names}) for names in ("ab", "a")]
    units = [
        admin_pb2.Unit(unit=f"unit-{n}", worker_id=f"worker-{n}", worker_address=worker.address)
        for n, worker in enumerate(workers)
    ]
    for unit, worker in zip(units, workers, strict=True):
        for name in worker.shapes:
            config = common_pb2.ModelConfig(name=name, path="x")
            unit.models.add(config=config, state=inference_pb2.MODEL_STATE_READY)
    placement = admin_pb2.Placement(epoch=1, units=units)
    assert await PlacementStore(setting.redis).compare_and_set(0, placement)
    gateway = await setting.gateway((await setting.scheduler()).address)
    workers[0].gate.clear()
    busy = await gateway.ask("b", [1, 2, 3], 10)
    await eventually(lambda: workers[0].seated("b") == 1)

    async def pulling() -> bool:
        """Whether the idle unit waits for requests of "a", and the busy one for those of "b" alone: not just
        between two pulls for "b", while one for "a" has yet to end that began before it was busy."""
        for _ in range(LOOKS):
            if int((await setting.redis.info("clients"))["blocked_clients"]) != 2:
                return False
            await asyncio.sleep(0.02)
        return True

    for number in range(REQUESTS):
        await eventually(pulling)
        client = await gateway.ask("a", [number, number + 1], 10)
        async with asyncio.timeout(10):
            await client.done.wait()
    workers[0].gate.set()
    async with asyncio.timeout(10):
        await busy.done.wait()
