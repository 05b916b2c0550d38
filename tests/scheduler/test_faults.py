"""Whatever dies, every request gets exactly the text of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from google.rpc import code_pb2

from muxserve.common import keys
from muxserve.common.registry import Registry
from muxserve.scheduler import gateways
from muxserve.scheduler.lease import UnitLease, leased
from muxserve.v1 import common_pb2, worker_pb2
from tests.scheduler.conftest import Setting, eventually, running
from tests.scheduler.fake_gateway import Client, FakeGateway
from tests.scheduler.fake_worker import FakeWorker, completion, shape

PROMPTS = [[n, n + 1, n + 2] for n in range(8)]


async def ask_all(gateway: FakeGateway, tokens: int = 60) -> list[Client]:
    return [await gateway.ask("a", prompt, tokens) for prompt in PROMPTS]


async def check_all(clients: list[Client], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        for client in clients:
            await client.done.wait()
    for client in clients:
        assert client.failed is None
        assert client.tokens == completion(client.request.prompt_tokens, client.request.max_tokens)


async def settled(setting: Setting, worker: FakeWorker) -> None:
    """Nothing is held and nothing is left in the queue."""

    async def idle() -> bool:
        return worker.available == worker.blocks and await setting.queue_length("a") == 0

    await eventually(idle, 8)


async def start(setting: Setting) -> tuple[FakeWorker, FakeGateway]:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.003)
    await setting.place(worker)
    return worker, await setting.gateway((await setting.scheduler()).address)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_an_executor_that_dies(setting: Setting, kind: str) -> None:
    worker, gateway = await start(setting)
    if kind == "prefill":  # later there may be none: prompts join what decodes
        worker.kill.append(kind)
    clients = await ask_all(gateway)
    if kind == "decode":
        await clients[3].reach(20)
        worker.kill.append(kind)
    await check_all(clients)
    assert not worker.kill
    await settled(setting, worker)


async def test_a_worker_that_dies_and_comes_back(setting: Setting) -> None:
    worker, gateway = await start(setting)
    clients = await ask_all(gateway)
    await clients[7].reach(20)
    await worker.stop()
    await worker.start()
    await check_all(clients)
    assert worker.streams == 2
    await settled(setting, worker)


async def test_a_worker_that_comes_back_elsewhere(setting: Setting) -> None:
    _, gateway = await start(setting)
    clients = await ask_all(gateway)
    await clients[7].reach(20)
    other = await setting.worker(400, {"a": shape(tokens_per_block=3)}, seconds=0.001)
    await setting.place(other)
    await check_all(clients)
    await settled(setting, other)


async def test_refused_sequences_are_computed_anew(setting: Setting) -> None:
    worker, gateway = await start(setting)
    clients = await ask_all(gateway)
    await clients[2].reach(10)
    worker.refuse += [worker_pb2.REFUSAL_REASON_OUT_OF_BLOCKS] * 3 + [worker_pb2.REFUSAL_REASON_NOT_OPEN] * 2
    await check_all(clients)
    assert not worker.refuse
    await settled(setting, worker)


async def test_a_request_that_is_always_refused_fails_alone(setting: Setting) -> None:
    worker, gateway = await start(setting)
    worker.refuse += [worker_pb2.REFUSAL_REASON_OUT_OF_SLOTS] * 9
    client = await gateway.ask("a", [1, 2], 5)
    async with asyncio.timeout(10):
        await client.done.wait()
    assert client.failed is not None and client.failed.code == code_pb2.INTERNAL
    await check_all(await ask_all(gateway, 10))
    await settled(setting, worker)


async def test_redis_that_dies_stops_no_generation_and_loses_no_request(setting: Setting) -> None:
    worker, gateway = await start(setting)
    clients = await ask_all(gateway)
    await clients[7].reach(5)
    setting.valkey.kill()
    await check_all(clients)
    setting.valkey.start()
    more = [await gateway.ask("a", prompt, 10) for prompt in PROMPTS]
    await check_all(more)
    await settled(setting, worker)


@asynccontextmanager
async def scheduler_process(setting: Setting, name: str = "scheduler-0") -> AsyncIterator[tuple[int, str]]:
    """A scheduler in a process of its own: its pid and address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "muxserve.scheduler",
        "--set",
        f"id={name}",
        "--set",
        f"redis_url={setting.valkey.url}",
    )
    registry = Registry(setting.redis)
    try:
        address = ""
        async with asyncio.timeout(20):
            while not address:
                entries = [e for e in await registry.list("scheduler") if e.pid == process.pid]
                address = entries[0].address if entries else ""
                await asyncio.sleep(0.02)
        yield process.pid, address
        if process.returncode is None:
            # Not process.terminate(): it may reap one that has just died, and then its exit code is lost.
            os.kill(process.pid, signal.SIGTERM)
    finally:
        async with asyncio.timeout(10):
            assert await process.wait() in (0, -signal.SIGKILL)


async def test_a_scheduler_that_is_killed_and_restarted(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.01)
    await setting.place(worker)
    async with scheduler_process(setting) as (pid, address):
        gateway = await setting.gateway(address)
        clients = await ask_all(gateway, tokens=120)
        await clients[7].reach(10)
        os.kill(pid, signal.SIGKILL)
    await gateway.detach()
    assert not any(client.done.is_set() for client in clients)
    async with scheduler_process(setting) as (_, address):
        await gateway.attach(address)
        await check_all(clients)
        assert {client.attempt for client in clients} == {2}
        await settled(setting, worker)


async def test_another_scheduler_takes_over_when_the_lease_has_run_out(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.01)
    await setting.place(worker)
    async with scheduler_process(setting, "scheduler-0") as (pid, address):
        gateway = await setting.gateway(address)
        clients = await ask_all(gateway)
        await clients[7].reach(10)
        os.kill(pid, signal.SIGKILL)
    await gateway.detach()
    other = await setting.scheduler("scheduler-1")
    await gateway.attach(other.address)
    await check_all(clients)
    await settled(setting, worker)


async def test_a_scheduler_that_stops_in_order_hands_its_requests_over_at_once(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.005)
    await setting.place(worker)
    async with running(setting.valkey.url, "scheduler-0") as first:
        gateway = await setting.gateway(first.address)
        clients = await ask_all(gateway)
        await clients[7].reach(10)
        await gateway.detach()
    assert await leased(setting.redis, ["unit-0"]) == set()
    second = await setting.scheduler("scheduler-1")
    await gateway.attach(second.address)
    await check_all(clients)
    await settled(setting, worker)


async def test_the_unit_stops_when_somebody_else_holds_its_lease(setting: Setting) -> None:
    worker = await setting.worker(600, {"a": shape()}, seconds=0.01)
    await setting.place(worker)
    first = await setting.scheduler("scheduler-0")
    gateway = await setting.gateway(first.address)
    clients = await ask_all(gateway, 120)
    await clients[7].reach(5)
    # As after a pause in which the lease ran out. At once, since the first one renews it all the time.
    epoch = int(await setting.redis.get(keys.unit_epoch("unit-0")) or 0) + 1
    async with setting.redis.pipeline(transaction=True) as pipe:
        pipe.set(keys.unit_epoch("unit-0"), epoch)
        pipe.set(keys.unit_lease("unit-0"), f"{epoch} scheduler-1", px=10_000)
        await pipe.execute()
    await eventually(lambda: not first.scheduler.status(), 5)
    await UnitLease(setting.redis, "unit-0", "scheduler-1").release(epoch)
    await check_all(clients)
    assert {client.attempt for client in clients} == {2}
    await settled(setting, worker)


async def test_a_broken_gateway_stream_loses_nothing(setting: Setting) -> None:
    worker, gateway = await start(setting)
    clients = await ask_all(gateway, 80)
    for tokens in (5, 30, 60):
        await clients[7].reach(tokens)
        gateway.break_stream()
        await gateway.attached.wait()
    await check_all(clients)
    await settled(setting, worker)


async def test_the_end_of_a_request_is_told_again_to_a_gateway_that_missed_it(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()})
    await setting.place(worker)
    scheduler = await setting.scheduler()
    gateway = await setting.gateway(scheduler.address)
    worker.gate.clear()
    clients = await ask_all(gateway, 12)
    for client in clients:
        await client.started.wait()
    await gateway.detach()
    worker.gate.set()
    await eventually(lambda: worker.available == worker.blocks and len(worker.jobs) > 2)
    assert await setting.queue_length("a") == len(clients), "not acknowledged before the gateway knows"
    await gateway.attach(scheduler.address)
    await check_all(clients)
    await settled(setting, worker)


async def test_a_gateway_that_does_not_come_back_frees_its_blocks(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "GRACE", 0.3)
    worker, gateway = await start(setting)
    clients = await ask_all(gateway, 400)
    await clients[7].reach(5)
    await gateway.detach()
    await settled(setting, worker)


async def test_a_gateway_that_comes_back_too_late_is_told(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "GRACE", 0.2)
    worker = await setting.worker(400, {"a": shape()}, seconds=0.003)
    await setting.place(worker)
    scheduler = await setting.scheduler()
    gateway = await setting.gateway(scheduler.address)
    clients = await ask_all(gateway, 400)
    await clients[7].reach(5)
    await gateway.detach()
    await settled(setting, worker)
    await gateway.attach(scheduler.address)
    async with asyncio.timeout(5):
        for client in clients:
            await client.done.wait()
            assert client.failed is not None and client.failed.code == code_pb2.UNAVAILABLE


async def test_a_gateway_that_does_not_keep_up_is_detached_and_served_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "MAX_PENDING", -1)
    worker, gateway = await start(setting)
    clients = await ask_all(gateway, 30)
    # Every event overflows: nothing arrives but by attaching again.
    await check_all(clients)
    await settled(setting, worker)


async def test_an_unanswered_resume_query_drops_the_request(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muxserve.scheduler.unit.RESUME_GRACE", 0.3)
    worker = await setting.worker(400, {"a": shape()})
    await setting.place(worker)
    gateway = FakeGateway(setting.queue)
    await ask_all(gateway)
    await setting.queue.pull({"a": 8}, "unit-dead", 0)
    gateway.mute = True
    scheduler = await setting.scheduler()
    await gateway.attach(scheduler.address)
    await settled(setting, worker)
    assert not worker.jobs
    await gateway.detach()


async def test_requests_whose_client_is_gone_are_not_resumed(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()})
    await setting.place(worker)
    gateway = FakeGateway(setting.queue)
    await ask_all(gateway)
    await setting.queue.pull({"a": 8}, "unit-dead", 0)
    gateway.clients.clear()
    await gateway.attach((await setting.scheduler()).address)
    await settled(setting, worker)
    assert not worker.jobs
    await gateway.detach()


async def test_a_resumed_request_that_was_complete_is_finished(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()})
    await setting.place(worker)
    gateway = FakeGateway(setting.queue)
    client = await gateway.ask("a", [1, 2, 3], 10)
    await setting.queue.pull({"a": 8}, "unit-dead", 0)
    client.tokens = completion([1, 2, 3], 10)
    await gateway.attach((await setting.scheduler()).address)
    await check_all([client])
    assert client.finish == common_pb2.FINISH_REASON_LENGTH
    assert not worker.jobs
    await settled(setting, worker)
    await gateway.detach()
