"""Versioned documents, over a real Valkey."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from muxserve.common.documents import PlacementStore, QuotaStore
from muxserve.common.errors import Unavailable
from muxserve.v1 import admin_pb2
from tests.support.valkey import ValkeyProcess


def placement(epoch: int, *units: str) -> admin_pb2.Placement:
    return admin_pb2.Placement(epoch=epoch, units=[admin_pb2.Unit(unit=unit) for unit in units])


async def test_a_placement_is_replaced_only_if_it_is_the_expected_one(redis_client: Redis) -> None:
    store = PlacementStore(redis_client)
    assert (await store.read()).epoch == 0
    assert await store.compare_and_set(0, placement(1, "u"))
    assert not await store.compare_and_set(0, placement(1, "other"))
    assert not await store.compare_and_set(7, placement(8, "other"))
    assert await store.read() == placement(1, "u")
    assert await store.compare_and_set(1, placement(2**64 - 1, "v"))
    assert not await store.compare_and_set(2**64 - 2, placement(2**64 - 1, "other"))
    assert await store.read() == placement(2**64 - 1, "v")
    with pytest.raises(ValueError, match="does not follow"):
        await store.compare_and_set(2, placement(2))


async def test_only_one_of_many_writers_wins(redis_client: Redis) -> None:
    store = PlacementStore(redis_client)
    results = await asyncio.gather(*(store.compare_and_set(0, placement(1, str(i))) for i in range(20)))
    assert sum(results) == 1


async def test_a_watcher_sees_the_present_and_then_every_change(redis_client: Redis) -> None:
    store = PlacementStore(redis_client)
    watch = store.watch()
    async with asyncio.timeout(10):
        assert (await anext(watch)).epoch == 0
        for epoch in (1, 2):
            await store.compare_and_set(epoch - 1, placement(epoch))
            assert (await anext(watch)).epoch == epoch
    await watch.aclose()


async def test_a_watcher_survives_redis(redis_client: Redis, valkey: ValkeyProcess) -> None:
    store = PlacementStore(redis_client)
    await store.compare_and_set(0, placement(1))
    watch = store.watch()
    async with asyncio.timeout(15):
        assert (await anext(watch)).epoch == 1
        change = asyncio.ensure_future(anext(watch))
        valkey.kill()
        with pytest.raises(Unavailable):
            await store.read()
        valkey.start()
        # The append-only file has it; and a document lost for a moment is no change.
        assert (await store.read()).epoch == 1
        await redis_client.flushall()
        await store.compare_and_set(0, placement(5))
        assert (await change).epoch == 5
    await watch.aclose()


async def test_quotas_are_kept_per_unit(redis_client: Redis) -> None:
    store = QuotaStore(redis_client)
    assert await store.read("u") == admin_pb2.Quotas(unit="u")
    first = admin_pb2.Quotas(unit="u", revision=1, blocks={"a": 10, "b": 0, "models/x:y": 2**40})
    assert await store.compare_and_set(first, 0)
    assert await store.read("u") == first
    assert (await store.read("v")).revision == 0
    assert not await store.compare_and_set(admin_pb2.Quotas(unit="u", revision=1), 0)
    # What a new revision does not name is gone.
    second = admin_pb2.Quotas(unit="u", revision=2, blocks={"a": 3})
    assert await store.compare_and_set(second, 1)
    assert await store.read("u") == second
