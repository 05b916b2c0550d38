"""Leases on units, over a real Valkey."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import Unavailable
from muxserve.scheduler import lease
from muxserve.scheduler.lease import LeaseLost, UnitLease, leased
from tests.scheduler.conftest import eventually
from tests.support.valkey import ValkeyProcess


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL", 0.4)
    monkeypatch.setattr(lease, "RENEW", 0.05)


async def test_one_scheduler_holds_a_unit_until_its_lease_runs_out(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL", 1.0)
    loop = asyncio.get_running_loop()
    before = loop.time()
    first = await UnitLease(redis_client, "u", "s0").acquire()
    assert await leased(redis_client, ["u", "v"]) == {"u"}
    second = await UnitLease(redis_client, "u", "s1").acquire()
    assert loop.time() - before > 0.9
    assert second > first


async def test_a_lease_that_is_kept_does_not_run_out(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL", 2.0)
    mine = UnitLease(redis_client, "u", "s0")
    keeper = asyncio.create_task(mine.keep(await mine.acquire()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2.5):
            await UnitLease(redis_client, "u", "s1").acquire()
    keeper.cancel()


async def test_the_same_scheduler_takes_its_old_lease_over_at_once_and_the_old_one_is_told(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL", 5.0)
    old = UnitLease(redis_client, "u", "s0")
    epoch = await old.acquire()
    keeper = asyncio.create_task(old.keep(epoch))
    async with asyncio.timeout(5):
        assert await UnitLease(redis_client, "u", "s0").acquire() > epoch
    with pytest.raises(LeaseLost):
        await keeper
    await old.release(epoch)
    assert await leased(redis_client, ["u"]) == {"u"}, "a lease that is not ours is not released"


async def test_a_released_lease_is_free(redis_client: Redis) -> None:
    mine = UnitLease(redis_client, "u", "s0")
    await mine.release(await mine.acquire())
    assert await leased(redis_client, ["u"]) == set()


async def test_the_owner_outlives_a_redis_that_was_away(redis_client: Redis, valkey: ValkeyProcess) -> None:
    mine = UnitLease(redis_client, "u", "s0")
    epoch = await mine.acquire()
    keeper = asyncio.create_task(mine.keep(epoch))
    valkey.kill()
    with pytest.raises(Unavailable):
        await leased(redis_client, ["u"])
    await asyncio.sleep(0.5)
    valkey.start()
    await eventually(lambda: _is_leased(redis_client), 3)
    assert not keeper.done()
    keeper.cancel()


async def _is_leased(redis: Redis) -> bool:
    return bool(await leased(redis, ["u"]))


async def test_epochs_grow_even_if_redis_has_lost_everything(redis_client: Redis) -> None:
    first = await UnitLease(redis_client, "u", "s0").acquire()
    await asyncio.sleep(0.002)
    await redis_client.flushall()
    assert await UnitLease(redis_client, "u", "s1").acquire() > first
    await redis_client.set(keys.unit_epoch("u"), first + 10**9)
    assert await UnitLease(redis_client, "u", "s1").acquire() == first + 10**9 + 1
