"""Acknowledgements wait for Redis and are bounded."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.queue import RequestQueue
from muxserve.scheduler import acks
from muxserve.scheduler.acks import Acknowledger
from muxserve.v1 import scheduler_pb2
from tests.scheduler.conftest import eventually
from tests.support.valkey import ValkeyProcess


async def test_they_arrive_once_redis_is_back(redis_client: Redis, valkey: ValkeyProcess) -> None:
    queue = RequestQueue(redis_client)
    acknowledger = Acknowledger(queue)
    for model in "ab":
        request = scheduler_pb2.QueuedRequest(request_id="r", model=model)
        await queue.admit(request, 10)
    taken = await queue.pull({"a": 1}, "u", 0) + await queue.pull({"b": 1}, "u", 0)
    work = asyncio.create_task(acknowledger.run())
    valkey.kill()
    for delivery in taken:
        acknowledger.add(delivery.model, delivery.entry_id)
    assert acknowledger.pending("a") == {taken[0].entry_id}
    valkey.start()
    await eventually(lambda: not acknowledger.pending("a") | acknowledger.pending("b"))
    assert await redis_client.xlen(keys.queue("a")) == await redis_client.xlen(keys.queue("b")) == 0
    work.cancel()


async def test_the_oldest_are_forgotten_when_there_are_too_many(
    redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acks, "LIMIT", 3)
    acknowledger = Acknowledger(RequestQueue(redis_client))
    for number in range(5):
        acknowledger.add("a", f"{number}-0")
    assert acknowledger.pending("a") == {"2-0", "3-0", "4-0"}
