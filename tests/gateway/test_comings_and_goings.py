"""Schedulers, Redis and the gateway itself come and go; requests go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

from muxserve.v1 import common_pb2
from tests.gateway.peer import Event, SchedulerPeer
from tests.gateway.service import Running, collect, ids_of, refusal, running, text_of
from tests.support.valkey import ValkeyProcess

LENGTH = common_pb2.FINISH_REASON_LENGTH
ANSWER = " of France is Paris — naïve 😀 日本語."


async def test_another_scheduler_goes_on_where_the_first_one_died(up: Running) -> None:
    ids = up.tokenizer.encode(ANSWER)
    call = up.generate()
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, ids[:4])
    assert list((await anext(aiter(call))).token_ids) == ids[:4]
    await up.scheduler.kill()

    heir = SchedulerPeer(up.redis, "scheduler-1")
    await heir.start()
    await heir.attached.wait()
    (claimed,) = await heir.queue.claim(["smol"], heir.id, {heir.id})
    assert claimed.attempt == 2
    request_id = claimed.request.request_id
    heir.send(Event(request_id=request_id, attempt=2, resume_query=Event.ResumeQuery()))
    answer = (await heir.message()).resume
    assert (answer.request_id, answer.attempt, answer.gone) == (request_id, 2, False)
    assert list(answer.emitted_tokens) == ids[:4]
    heir.tokens(claimed, 0, [9, 9, 9, 9, 9, 9], attempt=1)
    heir.tokens(claimed, 4, ids[4:8])
    heir.tokens(claimed, 2, ids[2:], finish=LENGTH)
    messages = await collect(call)
    assert ids_of(messages) == ids[4:]
    assert messages[-1].usage.completion_tokens == len(ids)
    await heir.kill()


async def test_a_stream_that_breaks_is_reopened_and_loses_nothing(up: Running) -> None:
    ids = up.tokenizer.encode(ANSWER)
    call = up.generate()
    delivery = await up.scheduler.pull("smol")
    before = up.scheduler.gateway_id
    for cut in (3, 5, 8):
        up.scheduler.tokens(delivery, 0, ids[:cut])
        up.scheduler.break_stream()
        await asyncio.wait_for(up.scheduler.attached.wait(), 5)
    up.scheduler.tokens(delivery, 0, ids, finish=LENGTH)
    messages = await collect(call)
    assert ids_of(messages) == ids and text_of(messages) == ANSWER
    assert up.scheduler.gateway_id == before


async def test_tokens_with_a_gap_are_an_internal_error(up: Running) -> None:
    call = up.generate(request_id="mine")
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5])
    up.scheduler.tokens(delivery, 2, [6])
    refused = await refusal(call)
    assert refused.code == grpc.StatusCode.INTERNAL and refused.request_id == "mine"
    assert (await up.scheduler.message()).cancel.request_id == delivery.request.request_id


async def test_a_scheduler_that_works_for_nobody_is_told(up: Running) -> None:
    up.scheduler.send(Event(request_id="nobody", attempt=1, tokens=Event.Tokens(token_ids=[1])))
    assert (await up.scheduler.message()).cancel.request_id == "nobody"
    up.scheduler.send(Event(request_id="nobody", attempt=3, resume_query=Event.ResumeQuery()))
    answer = (await up.scheduler.message()).resume
    assert answer.gone and (answer.request_id, answer.attempt) == ("nobody", 3)


async def test_a_request_waits_for_a_scheduler_to_come(up: Running) -> None:
    await up.scheduler.kill()
    await up.wait_for_health(False)
    call = up.generate()
    await up.wait_for_queue(1)
    await up.scheduler.start()
    await up.wait_for_health(True)
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5], finish=LENGTH)
    assert ids_of(await collect(call)) == [5]


async def test_without_redis_new_requests_are_refused_and_running_ones_go_on(up: Running) -> None:
    running_call = up.generate()
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5])
    await anext(aiter(running_call))
    up.valkey.kill()
    refused = await refusal(up.generate(request_id="mine"))
    assert refused.code == grpc.StatusCode.UNAVAILABLE and refused.request_id == "mine"
    assert refused.retry_after is not None and refused.retry_after > 0
    up.scheduler.tokens(delivery, 1, [6], finish=LENGTH)
    assert ids_of(await collect(running_call)) == [6]

    cancelled = up.generate(stop=["x"])
    assert (await refusal(cancelled)).code == grpc.StatusCode.UNAVAILABLE
    up.valkey.start()
    call = up.generate()
    async with asyncio.timeout(10):
        while (found := await up.scheduler.pull("smol")).request.sampling.seed == 0:
            pass
    up.scheduler.tokens(found, 0, [5], finish=LENGTH)
    assert ids_of(await collect(call)) == [5]


async def test_a_call_cancelled_while_redis_is_away_is_withdrawn_later(up: Running) -> None:
    call = up.generate()
    await up.wait_for_queue(1)
    up.valkey.kill()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collect(call)
    up.valkey.start()
    await up.wait_for_queue(0)


async def test_full_means_refused_with_a_time_to_come_back(
    valkey: ValkeyProcess, redis_client: Redis, smollm2: Path, tmp_path: Path
) -> None:
    async with running(valkey, redis_client, smollm2, tmp_path, max_waiting=2, max_requests=3) as small:
        waiting = [small.generate() for _ in range(2)]
        await small.wait_for_queue(2)
        refused = await refusal(small.generate(request_id="mine"))
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "queue" in refused.message and refused.retry_after and refused.request_id == "mine"
        waiting.append(small.generate(model="smol-too"))
        await small.wait_for_queue(1, "smol-too")
        refused = await refusal(small.generate(model="smol-too"))
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "gateway" in refused.message and refused.retry_after
        for call in waiting:
            call.cancel()
        await small.wait_for_queue(0)
        call = small.generate()
        delivery = await small.scheduler.pull("smol")
        small.scheduler.tokens(delivery, 0, [5], finish=LENGTH)
        assert ids_of(await collect(call)) == [5]


async def test_stopping_drains_what_runs_and_refuses_what_comes(up: Running) -> None:
    call = up.generate()
    delivery = await up.scheduler.pull("smol")
    up.scheduler.tokens(delivery, 0, [5])
    await anext(aiter(call))
    up.stop.set()
    await up.wait_for_health(False)
    refused = await refusal(up.generate())
    assert refused.code == grpc.StatusCode.UNAVAILABLE and refused.retry_after
    up.scheduler.tokens(delivery, 1, [6], finish=LENGTH)
    assert ids_of(await collect(call)) == [6]
    await up.ended


async def test_stopping_ends_what_does_not_end_in_time(
    valkey: ValkeyProcess, redis_client: Redis, smollm2: Path, tmp_path: Path
) -> None:
    async with running(valkey, redis_client, smollm2, tmp_path, drain=0.1) as up:
        calls = [up.generate() for _ in range(2)]
        delivery = await up.scheduler.pull("smol")
        await up.wait_for_queue(2)
        up.stop.set()
        for call in calls:
            refused = await refusal(call)
            assert refused.code == grpc.StatusCode.UNAVAILABLE and refused.retry_after
        await up.ended
        assert (await up.scheduler.message()).cancel.request_id == delivery.request.request_id
        await up.wait_for_queue(0)
