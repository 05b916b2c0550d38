"""The connection to Redis, over a real Valkey."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from muxserve.common.errors import Unavailable
from muxserve.common.store import CONNECTIONS, connect, redis_errors
from tests.support.valkey import ValkeyProcess


async def test_a_burst_of_commands_waits_for_connections(redis_client: Redis) -> None:
    """What clients of a process that was stopped have sent comes all at once."""
    answers = await asyncio.gather(*(redis_client.incr("count") for _ in range(20 * CONNECTIONS)))
    assert sorted(answers) == list(range(1, 20 * CONNECTIONS + 1))
    assert len(await redis_client.client_list()) <= CONNECTIONS


async def test_commands_that_end_badly_give_their_connections_back(
    valkey: ValkeyProcess, redis_client: Redis
) -> None:
    blocked = _blocked(redis_client)
    waiting = [asyncio.create_task(_get(redis_client)) for _ in range(CONNECTIONS)]
    while len(await _clients(valkey)) <= CONNECTIONS:
        pass
    for task in (*blocked, *waiting):
        task.cancel()
    await asyncio.gather(*blocked, *waiting, return_exceptions=True)
    valkey.kill()
    refused = await asyncio.gather(
        *(_get(redis_client) for _ in range(3 * CONNECTIONS)), return_exceptions=True
    )
    assert {type(answer) for answer in refused} == {Unavailable}
    valkey.start()
    assert await asyncio.gather(*(_get(redis_client) for _ in range(2 * CONNECTIONS))) == [None] * (
        2 * CONNECTIONS
    )


async def test_a_command_does_not_wait_for_ever(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxserve.common.store.WAIT", 0.05)
    blocked = _blocked(redis_client)
    await asyncio.sleep(0)  # they take their connections in the order in which they were made
    with pytest.raises(Unavailable, match="no connection came free"):
        await _get(redis_client)
    await asyncio.gather(*blocked, return_exceptions=True)


def _blocked(client: Redis) -> list[asyncio.Task[Any]]:
    """Commands that hold all connections for a second."""

    async def hold() -> object:
        return await cast(Any, client).blpop(["nothing"], timeout=1)

    return [asyncio.create_task(hold()) for _ in range(CONNECTIONS)]


async def _get(client: Redis) -> object:
    with redis_errors("reading a key"):
        return await client.get("a")


async def _clients(valkey: ValkeyProcess) -> list[object]:
    async with connect(valkey.url) as other:
        return list(await other.client_list())
