"""A unit from the queue to the last token, with real Redis and gRPC and a worker that makes trouble."""

from __future__ import annotations

import asyncio
import random

import pytest

from muxserve.v1 import common_pb2
from tests.scheduler.conftest import Setting, eventually
from tests.scheduler.fake_worker import completion, shape

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


async def test_a_request_is_served_and_its_entry_acknowledged(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape()})
    await setting.place(worker)
    running = await setting.scheduler()
    gateway = await setting.gateway(running.address)
    client = await gateway.ask("a", [1, 2, 3, 4, 5], 20, logprobs=0)
    async with asyncio.timeout(5):
        await client.done.wait()
    assert client.tokens == completion([1, 2, 3, 4, 5], 20)
    assert client.finish == LENGTH
    assert client.logprobs == 20
    await eventually(lambda: worker.available == 200)
    assert await setting.queue_length("a") == 1, "kept until the gateway has surely heard of the end"
    await eventually(lambda: _empty(setting, "a"))
    status = await running.status()
    assert status.connected and status.policy == "adbs"
    assert status.models[0].generated_tokens == 20
    assert status.models[0].prefill_tokens == 5


async def _empty(setting: Setting, model: str) -> bool:
    return await setting.queue_length(model) == 0


async def test_a_stop_token_ends_it(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape()})
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    stop = completion([7, 8], 30)[11]
    client = await gateway.ask("a", [7, 8], 30, stop=[stop])
    async with asyncio.timeout(5):
        await client.done.wait()
    assert client.tokens == completion([7, 8], 30, [stop])
    assert client.finish == STOP


@pytest.mark.parametrize("policy", ["adbs", "fcfs"])
async def test_many_requests_in_a_tiny_arena_all_get_their_text(setting: Setting, policy: str) -> None:
    shapes = {"a": shape(4, 3, 16), "b": shape(6, 2, 16)}
    worker = await setting.worker(60, shapes, seconds=0.0005)
    await setting.place(worker)
    running = await setting.scheduler(policy=policy, chunk_tokens=16)
    gateway = await setting.gateway(running.address)
    order = random.Random(3)
    clients = []
    for index in range(48):
        prompt = [order.randrange(1000) for _ in range(order.randint(1, 30))]
        clients.append(await gateway.ask("ab"[index % 2], prompt, order.randint(1, 40)))
    async with asyncio.timeout(60):
        for client in clients:
            await client.done.wait()
    for client in clients:
        assert client.tokens == completion(client.request.prompt_tokens, client.request.max_tokens)
    assert worker.peak <= 60
    status = await running.status()
    assert sum(model.preemptions for model in status.models) > 0, "the arena was too small for all"
    await eventually(lambda: worker.available == 60)
