"""AdminService over gRPC, a real Valkey and a worker that is a peer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from muxserve.client import AsyncAdminClient, Conflict, InvalidRequest, ModelState, NotFound, QuotaState
from muxserve.common.documents import QuotaStore
from muxserve.common.registry import Registry
from muxserve.placement.__main__ import serve
from muxserve.placement.settings import PlacementSettings
from muxserve.v1 import admin_pb2
from tests.placement.peers import PeerWorker, eventually
from tests.support.valkey import ValkeyProcess


@asynccontextmanager
async def administered(redis: Redis, valkey: ValkeyProcess) -> AsyncIterator[AsyncAdminClient]:
    """A placement service with one ready model "a" on one worker."""
    settings = PlacementSettings(models=[{"name": "a", "path": "100"}], redis_url=valkey.url)
    stop, registry = asyncio.Event(), Registry(redis)
    async with PeerWorker("worker-0").serve(registry):
        service = asyncio.create_task(serve(settings, stop))

        async def announced() -> bool:
            return bool(await registry.list("placement"))

        async def ready() -> bool:
            units = (await client.placement()).units
            return any(model.state is ModelState.READY for unit in units for model in unit.models)

        try:
            await eventually(announced)
            (entry,) = await registry.list("placement")
            async with AsyncAdminClient(entry.address) as client:
                await eventually(ready)
                yield client
        finally:
            stop.set()
            async with asyncio.timeout(5):
                await service
        assert not await registry.list("placement")


async def test_status_shows_placement_workers_and_services(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with administered(redis_client, valkey) as client:
        status = await client.status()
    assert status.placement.units[0].worker_id == "worker-0"
    assert [worker.pool.total_blocks for worker in status.workers] == [1000]
    assert [service.kind for service in status.services] == ["placement", "worker"]


async def test_status_answers_while_redis_is_away(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with administered(redis_client, valkey) as client:
        before = await client.status()
        valkey.kill()
        try:
            assert await client.status() == before
        finally:
            valkey.start()


async def test_a_quota_is_set_with_compare_and_set(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with administered(redis_client, valkey) as client:
        await QuotaStore(redis_client).compare_and_set(
            admin_pb2.Quotas(unit="unit-worker-0", revision=7, blocks={"a": 1000, "b": 1}), 0, "policy", 1.0
        )
        quotas = await client.set_quota("a", 600, expected_revision=7)
        assert (quotas.revision, dict(quotas.blocks)) == (8, {"a": 600, "b": 1})
        shown = await client.quotas()
        assert (shown.revision, shown.blocks, shown.state) == (8, quotas.blocks, QuotaState.PENDING)
        assert [(each.revision, each.author) for each in shown.history] == [(8, "admin"), (7, "policy")]
        assert time.time() - shown.history[0].asked < 60
        with pytest.raises(Conflict):
            await client.set_quota("a", 500, expected_revision=7)
        assert (await client.set_quota("a", 500)).revision == 9


async def test_bad_quotas_are_refused_by_name(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with administered(redis_client, valkey) as client:
        with pytest.raises(NotFound, match="nosuch"):
            await client.set_quota("a", 1, unit="nosuch")
        with pytest.raises(NotFound, match="nosuch"):
            await client.set_quota("nosuch", 1)
        with pytest.raises(InvalidRequest, match="1000 blocks") as caught:
            await client.set_quota("a", 1001)
        assert caught.value.field == "blocks"
        assert (await client.quotas()).revision == 0
