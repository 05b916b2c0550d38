"""The request queue over a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from redis.asyncio import Redis

from muxserve.common import keys
from muxserve.common.errors import Overloaded, Unavailable
from muxserve.common.queue import GROUP, RequestQueue
from muxserve.v1 import scheduler_pb2
from tests.support.valkey import ValkeyProcess


def request(name: str, model: str = "a") -> scheduler_pb2.QueuedRequest:
    return scheduler_pb2.QueuedRequest(request_id=name, model=model, prompt_tokens=[1, 2, 3], max_tokens=4)


def names(deliveries: Iterable[object]) -> list[str]:
    return [delivery.request.request_id for delivery in deliveries]  # type: ignore[attr-defined]


@pytest.fixture
def queue(redis_client: Redis) -> RequestQueue:
    return RequestQueue(redis_client)


async def test_requests_come_out_once_in_the_order_of_admission(queue: RequestQueue) -> None:
    for index in range(5):
        await queue.admit(request(f"r{index}"), 10)
    first = await queue.pull({"a": 2}, "s0", 0)
    second = await queue.pull({"a": 10}, "s1", 0)
    assert names(first) == ["r0", "r1"]
    assert names(second) == ["r2", "r3", "r4"]
    assert first[0].request == request("r0")
    assert {delivery.attempt for delivery in first + second} == {1}
    assert await queue.pull({"a": 10}, "s1", 0) == []


async def test_full_queue_refuses_with_retry_after_and_counts_only_what_waits(queue: RequestQueue) -> None:
    await queue.admit(request("r0"), 2)
    await queue.admit(request("r1"), 2)
    with pytest.raises(Overloaded, match="full") as caught:
        await queue.admit(request("r2"), 2)
    assert caught.value.retry_after
    assert await queue.depth("a") == 2
    await queue.pull({"a": 1}, "s0", 0)
    assert await queue.depth("a") == 1
    await queue.admit(request("r3"), 2)


async def test_a_blocked_pull_wakes_up_for_any_of_its_models(queue: RequestQueue) -> None:
    pull = asyncio.create_task(queue.pull({"a": 4, "b": 1, "c": 0}, "s0", 1500))
    await queue.admit(request("r0", "b"), 2)
    async with asyncio.timeout(1):
        deliveries = await pull
    assert names(deliveries) == ["r0"]
    assert deliveries[0].model == "b"
    assert await queue.pull({"a": 1}, "s0", 1) == []
    assert await queue.pull({"c": 0}, "s0", 1500) == []


async def test_withdrawn_and_acknowledged_entries_are_gone(queue: RequestQueue, redis_client: Redis) -> None:
    waiting = await queue.admit(request("r0"), 9)
    await queue.admit(request("r1"), 9)
    await queue.withdraw("a", waiting)
    (delivery,) = await queue.pull({"a": 9}, "s0", 0)
    assert delivery.request.request_id == "r1"
    await queue.acknowledge("a", [delivery.entry_id])
    await queue.acknowledge("a", [delivery.entry_id])
    assert await redis_client.xlen(keys.queue("a")) == 0
    assert await queue.claim(["a"], "s1", set()) == []


async def test_claim_takes_requests_of_the_dead_and_raises_the_attempt(queue: RequestQueue) -> None:
    for index in range(4):
        await queue.admit(request(f"r{index}"), 9)
    await queue.pull({"a": 2}, "dead", 0)
    await queue.pull({"a": 1}, "alive", 0)
    claimed = await queue.claim(["a"], "s1", {"alive", "s1"})
    assert [(d.request.request_id, d.attempt) for d in claimed] == [("r0", 2), ("r1", 2)]
    assert await queue.claim(["a"], "s1", {"alive", "s1"}, {d.entry_id for d in claimed}) == []
    assert [d.attempt for d in await queue.claim(["a"], "s2", {"alive", "s2"})] == [3, 3]
    assert names(await queue.pull({"a": 9}, "s1", 0)) == ["r3"]


async def test_a_restarted_consumer_claims_what_it_forgot_and_nothing_else(
    queue: RequestQueue,
) -> None:
    for index in range(2):
        await queue.admit(request(f"r{index}"), 9)
    known, _forgotten = await queue.pull({"a": 2}, "s0", 0)
    claimed = await queue.claim(["a"], "s0", {"s0"}, {known.entry_id})
    assert [(d.request.request_id, d.attempt) for d in claimed] == [("r1", 2)]


async def test_what_is_handed_back_waits_again_and_is_claimed_by_whoever_comes(queue: RequestQueue) -> None:
    for index in range(4):
        await queue.admit(request(f"r{index}"), 10)
    first = await queue.pull({"a": 3}, "s0", 0)
    assert await queue.release("a", "s0", [first[0].entry_id]) == 2
    assert await queue.depth("a") == 3
    with pytest.raises(Overloaded):
        await queue.admit(request("r4"), 3)
    claimed = await queue.claim(["a"], "s1", ["s0", "s1"])
    assert [(each.request.request_id, each.attempt) for each in claimed] == [("r1", 2), ("r2", 2)]
    assert await queue.depth("a") == 1
    assert await queue.release("a", "s0") == 1
    assert await queue.release("nothing-was-ever-queued", "s0") == 0


async def test_claim_skips_entries_withdrawn_while_pending(queue: RequestQueue, redis_client: Redis) -> None:
    entry = await queue.admit(request("r0"), 9)
    await queue.pull({"a": 1}, "dead", 0)
    await redis_client.xdel(keys.queue("a"), entry)
    assert await queue.claim(["a"], "s1", {"s1"}) == []
    assert (await redis_client.xpending(keys.queue("a"), GROUP))["pending"] == 0


async def test_an_unreadable_entry_is_removed(queue: RequestQueue, redis_client: Redis) -> None:
    await redis_client.xadd(keys.queue("a"), {b"r": b"\xff\xff"})
    await redis_client.xadd(keys.queue("a"), {b"other": b"field"})
    await queue.admit(request("r0"), 9)
    assert names(await queue.pull({"a": 9}, "s0", 0)) == ["r0"]
    assert await redis_client.xlen(keys.queue("a")) == 1


async def test_redis_away_is_unavailable_and_its_restart_loses_nothing(
    queue: RequestQueue, valkey: ValkeyProcess
) -> None:
    await queue.admit(request("r0"), 9)
    await queue.admit(request("r1"), 9)
    await queue.pull({"a": 1}, "s0", 0)
    valkey.kill()
    for call in (
        queue.admit(request("r2"), 9),
        queue.pull({"a": 1}, "s0", 0),
        queue.claim(["a"], "s0", {"s0"}),
        queue.acknowledge("a", ["1-1"]),
        queue.depth("a"),
    ):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.retry_after
    valkey.start()
    assert await queue.depth("a") == 1
    assert names(await queue.pull({"a": 9}, "s0", 0)) == ["r1"]
    assert names(await queue.claim(["a"], "s1", {"s1"})) == ["r0", "r1"]


async def test_a_loop_over_redis_ends_when_it_is_cancelled(queue: RequestQueue) -> None:
    async def loop() -> None:
        while True:
            await queue.depth("a")

    for index in range(100):
        task = asyncio.create_task(loop())
        await asyncio.sleep(index * 0.00002)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=2)
        assert done, "the cancellation was lost"
        assert task.cancelled()
