"""Versioned documents, over a real Valkey."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.documents import KEPT_REVISIONS, PlacementStore, QuotaStore
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
    assert await store.compare_and_set(first, 0, "policy", 1.0)
    assert await store.read("u") == first
    assert (await store.read("v")).revision == 0
    assert not await store.compare_and_set(admin_pb2.Quotas(unit="u", revision=1), 0, "policy", 2.0)
    # What a new revision does not name is gone.
    second = admin_pb2.Quotas(unit="u", revision=2, blocks={"a": 3})
    assert await store.compare_and_set(second, 1, "admin", 3.0)
    assert await store.read("u") == second


async def test_what_became_of_each_revision_of_quotas_is_kept(redis_client: Redis) -> None:
    store = QuotaStore(redis_client)

    async def ask(revision: int, author: str = "policy") -> None:
        quotas = admin_pb2.Quotas(unit="u", revision=revision, blocks={"a": revision})
        assert await store.compare_and_set(quotas, revision - 1, author, 100.0 + revision)

    async def states() -> dict[int, str]:
        name = admin_pb2.QuotaState.Name
        return {r.revision: name(r.state).removeprefix("QUOTA_STATE_") for r in await store.history("u")}

    await ask(1)
    assert await states() == {1: "PENDING"}
    await store.record("u", 1, [])
    await ask(2, "admin")
    await store.record("u", 2, ["b", "a"])
    assert await states() == {2: "DEFERRED", 1: "APPLIED"}
    newest = (await store.history("u"))[0]
    assert (newest.author, dict(newest.blocks), newest.asked_unix_ms) == ("admin", {"a": 2}, 102_000)
    assert list(newest.above) == ["a", "b"]
    await store.record("u", 2, [])
    assert await states() == {2: "APPLIED", 1: "APPLIED"}
    await ask(3)
    await ask(4)
    await store.record("u", 4, ["a"])
    await ask(5)
    assert await states() == {5: "PENDING", 4: "STALE", 3: "STALE", 2: "APPLIED", 1: "APPLIED"}
    assert not (await store.history("u"))[1].above


async def test_only_the_latest_revisions_of_quotas_are_kept(redis_client: Redis) -> None:
    store = QuotaStore(redis_client)
    for revision in range(1, KEPT_REVISIONS + 11):
        quotas = admin_pb2.Quotas(unit="u", revision=revision, blocks={"a": revision})
        assert await store.compare_and_set(quotas, revision - 1, "policy", 1.0)
        await store.record("u", revision, [])
    await store.record("u", 3, ["a"])
    kept = await store.history("u")
    assert [each.revision for each in kept] == list(range(KEPT_REVISIONS + 10, 10, -1))
    assert await redis_client.hlen(keys.quota_history("u")) == 2 * KEPT_REVISIONS
