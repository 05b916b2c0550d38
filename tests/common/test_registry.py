"""Who is alive, over a real Valkey."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from muxserve.common import keys, registry
from muxserve.common.errors import Unavailable
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.v1 import admin_pb2
from tests.support.valkey import ValkeyProcess


def entry(name: str = "worker-0") -> admin_pb2.ServiceEntry:
    return entry_of_this_process("worker", name, "127.0.0.1:1")


async def test_what_is_kept_is_listed_until_its_end(redis_client: Redis) -> None:
    services, mine = Registry(redis_client), entry()
    await services.announce(entry("worker-1"))
    async with services.keep(mine):
        async with asyncio.timeout(5):
            while len(await services.list("worker")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [e.id for e in await services.list("worker")] == ["worker-0", "worker-1"]
        assert (await services.list("worker"))[0] == mine
        assert await services.list("gateway") == []
    assert [e.id for e in await services.list("worker")] == ["worker-1"]


async def test_a_process_that_dies_is_forgotten(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    services = Registry(redis_client)
    await services.announce(entry())
    assert await services.list("worker")
    monkeypatch.setattr(registry, "TTL", 0.2)
    await services.announce(entry())
    await asyncio.sleep(0.3)
    assert await services.list("worker") == []
    assert await redis_client.scard(keys.services("worker")) == 0


async def test_a_process_that_ends_leaves_its_successors_entry(redis_client: Redis) -> None:
    services, old, new = Registry(redis_client), entry(), entry()
    await services.announce(old)
    await services.announce(new)
    await services.withdraw(old)
    assert await services.list("worker") == [new]
    await services.withdraw(new)
    assert await services.list("worker") == []


async def test_an_entry_outlives_the_redis_that_held_it(
    redis_client: Redis, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "HEARTBEAT", 0.05)
    services, mine = Registry(redis_client), entry()
    async with services.keep(mine):
        await asyncio.sleep(0.1)
        valkey.kill()
        with pytest.raises(Unavailable):
            await services.list("worker")
        (valkey.directory / "appendonlydir").rename(valkey.directory / "lost")
        valkey.start()
        async with asyncio.timeout(5):
            while not await Registry(redis_client).list("worker"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_after_redis_was_away_nobody_is_taken_for_dead_at_once(
    redis_client: Redis, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TTL", 1.0)
    monkeypatch.setattr(registry, "GRACE", 60.0)
    services = Registry(redis_client)
    await services.announce(entry())
    assert len(await services.list("worker")) == 1
    valkey.kill()
    with pytest.raises(Unavailable) as caught:
        await services.list("worker")
    assert caught.value.retry_after == 1.0
    assert len(services.known("worker")) == 1
    await asyncio.sleep(1.1)
    valkey.start()
    assert len(await services.list("worker")) == 1
    monkeypatch.setattr(registry, "GRACE", 0.0)  # it is over
    assert await services.list("worker") == []
