"""A unit from the queue to the last token, with real Redis and gRPC and a worker that makes trouble."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from muxserve.common.documents import QuotaStore
from muxserve.common.rpc import channel
from muxserve.scheduler.policy import POLICIES
from muxserve.scheduler.scheduler import Scheduler
from muxserve.scheduler.settings import SchedulerSettings
from muxserve.scheduler.unit import AHEAD
from muxserve.v1 import admin_pb2, common_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2
from tests.scheduler.conftest import Setting, eventually
from tests.scheduler.fake_gateway import FakeGateway
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
    assert status.connected and status.policy == "mux"
    assert status.models[0].generated_tokens == 20
    assert status.models[0].prefill_tokens == 5


async def _empty(setting: Setting, model: str) -> bool:
    return await setting.queue_length(model) == 0


@pytest.mark.parametrize("lease_steps", [1, 3, 8])
async def test_the_next_lease_is_at_the_worker_before_one_ends(setting: Setting, lease_steps: int) -> None:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.02)
    worker.patience = 1.0
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler(lease_steps=lease_steps)).address)
    clients = [await gateway.ask("a", [1, 2, number], 26) for number in range(3)]
    async with asyncio.timeout(15):
        for client in clients:
            await client.done.wait()
    for number, client in enumerate(clients):
        assert client.tokens == completion([1, 2, number], 26)
    late = worker.followed.count(False)
    assert late <= 1 + len(clients), "only where nobody was left, or somebody had just joined"
    assert len(worker.followed) > late


async def test_a_lease_that_ends_for_somebody_who_joins_is_followed_at_once(setting: Setting) -> None:
    worker = await setting.worker(400, {"a": shape()}, seconds=0.02)
    worker.patience = 1.0
    await setting.place(worker)
    running = await setting.scheduler(lease_steps=32)
    gateway = await setting.gateway(running.address)
    first = await gateway.ask("a", [1, 2, 3], 60)
    await first.reach(3)
    others = [await gateway.ask("a", [4, number], 20) for number in range(2)]
    async with asyncio.timeout(15):
        for client in (first, *others):
            await client.done.wait()
    assert first.tokens == completion([1, 2, 3], 60)
    assert others[0].tokens == completion([4, 0], 20)
    joined = [job for job in worker.jobs if isinstance(job, worker_pb2.DecodeJob) and job.prompts]
    assert joined, "short prompts go along with what decodes"
    assert worker.cut_short and all(worker.cut_short), "the next lease was there"
    assert all(not job.prompts or set(job.prompts) < set(job.sequences) for job in joined)
    counted = (await running.status()).models[0]
    assert counted.prefill_tokens == 3 + 2 + 2
    assert counted.prefill_job_tokens == 7 - 2 * sum(len(job.prompts) for job in joined)
    assert counted.decode_step_tokens < counted.generated_tokens == 100, "of leases without prompts"
    await eventually(lambda: worker.available == 400)


@pytest.mark.parametrize("policy", ["mux", "adbs", "fcfs", "round_robin"])
async def test_the_next_prompt_is_at_the_worker_before_one_is_computed(setting: Setting, policy: str) -> None:
    worker = await setting.worker(400, {"a": shape(), "b": shape()}, seconds=0.02)
    worker.patience = 1.0
    await setting.place(worker)
    running = await setting.scheduler(policy=policy, chunk_tokens=24)
    gateway = await setting.gateway(running.address)
    prompts = [(model, [number, *range(number, 40)]) for number in range(3) for model in "ab"]
    worker.gate.clear()
    clients = [await gateway.ask(model, prompt, 2) for model, prompt in prompts]
    worker.gate.set()
    async with asyncio.timeout(15):
        for client in clients:
            await client.done.wait()
    for (_, prompt), client in zip(prompts, clients, strict=True):
        assert client.tokens == completion(prompt, 2)
    jobs = [job for job in worker.jobs if isinstance(job, worker_pb2.PrefillJob)]
    assert len(worker.prefills_followed) == len(jobs) > 6, "prompts came in chunks"
    assert worker.prefills_followed.count(False) <= 2, "but for the last one, and who came too late"


async def test_a_gateway_may_cancel_by_number(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape()}, seconds=0.01)
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    client = await gateway.ask("a", [1, 2, 3], 400)
    await client.reach(5)
    (number,) = gateway.numbers
    await gateway.cancel_number(number)
    await eventually(lambda: worker.available == 200)
    assert not client.done.is_set()


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


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"spatial"}))
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


async def test_a_cancelled_request_frees_its_blocks_wherever_it_is(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape(slots=2)}, seconds=0.02)
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    worker.gate.clear()
    in_prefill = await gateway.ask("a", [1] * 40, 400)
    await in_prefill.started.wait()
    await eventually(lambda: worker.available < 200)
    await gateway.cancel(in_prefill)
    worker.gate.set()
    await eventually(lambda: worker.available == 200)

    decoding = [await gateway.ask("a", [n], 500) for n in range(2)]
    queued = await gateway.ask("a", [3], 500)  # the last to be due
    await decoding[1].reach(5)
    await queued.started.wait()
    await gateway.cancel(queued)
    for client in decoding:
        await gateway.cancel(client)
    await eventually(lambda: worker.available == 200)
    await eventually(lambda: _empty(setting, "a"))
    assert not worker.sequences
    after = await gateway.ask("a", [9], 3)
    await after.done.wait()
    assert after.tokens == completion([9], 3)


async def test_a_request_ends_at_its_deadline_wherever_it_is(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape(slots=1)}, seconds=0.02)
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    running = await gateway.ask("a", [1], 500, deadline=0.6)
    await running.reach(1)
    worker.gate.clear()
    waiting = await gateway.ask("a", [2], 5, deadline=0.3)
    late = await gateway.ask("a", [3], 5, deadline=-1)
    async with asyncio.timeout(5):
        for client in (running, waiting, late):
            await client.done.wait()
            assert client.failed is not None and client.failed.code == code_pb2.DEADLINE_EXCEEDED
    assert running.tokens == completion([1], len(running.tokens))
    worker.gate.set()
    await eventually(lambda: worker.available == 200)
    await eventually(lambda: _empty(setting, "a"))


async def test_requests_of_a_model_that_is_gone_or_failed_are_told(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape(), "b": shape()}, seconds=0.02)
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    clients = [await gateway.ask("a", [1], 500), await gateway.ask("b", [1], 30)]
    await clients[0].reach(3)
    await setting.place(worker, ["b"])
    async with asyncio.timeout(5):
        for client in clients:
            await client.done.wait()
    assert clients[0].failed is not None and clients[0].failed.code == code_pb2.NOT_FOUND
    assert clients[1].tokens == completion([1], 30)
    await eventually(lambda: worker.available == 200)


async def test_a_model_that_is_loaded_later_is_served_then(setting: Setting) -> None:
    worker = await setting.worker(200, {"b": shape()})
    loaded = {"a": shape(), "b": shape()}
    worker.shapes = loaded
    await setting.place(worker)
    worker.shapes = {"b": loaded["b"]}
    gateway = await setting.gateway((await setting.scheduler()).address)
    early, other = await gateway.ask("a", [1], 10), await gateway.ask("b", [1], 10)
    await other.done.wait()
    assert not early.started.is_set(), "left in the queue for whoever has the model"
    worker.shapes = loaded
    worker.changed()
    async with asyncio.timeout(5):
        await early.done.wait()
    assert early.tokens == completion([1], 10)


async def test_a_request_that_cannot_fit_fails_alone(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape(context=50)})
    await setting.place(worker)
    gateway = await setting.gateway((await setting.scheduler()).address)
    too_long = await gateway.ask("a", [1] * 40, 11)
    empty = await gateway.ask("a", [], 11)
    good = await gateway.ask("a", [1] * 40, 10)
    async with asyncio.timeout(5):
        for client in (too_long, empty, good):
            await client.done.wait()
    assert too_long.failed is not None and "51 tokens" in too_long.failed.message
    assert empty.failed is not None
    assert good.tokens == completion([1] * 40, 10)


async def test_quotas_are_kept_in_redis_and_follow_an_administrator(setting: Setting) -> None:
    shapes = {"a": shape(4, 2), "b": shape(4, 6)}
    worker = await setting.worker(1000, shapes)
    await setting.place(worker)
    running = await setting.scheduler()
    store = QuotaStore(setting.redis)
    await eventually(lambda: _stored(store, {"a": 300, "b": 700}))
    await eventually(lambda: worker.quotas == {"a": 300, "b": 700})
    stored = await store.read("unit-0")
    change = admin_pb2.Quotas(unit="unit-0", revision=stored.revision + 1, blocks={"a": 500, "b": 500})
    assert await store.compare_and_set(change, stored.revision, "admin", 1.0)
    await eventually(lambda: worker.quotas == {"a": 500, "b": 500})
    status = await running.status()
    assert [model.quota_blocks for model in status.models] == [500, 500]
    await worker.stop()
    worker.quotas = {}
    await worker.start()
    await eventually(lambda: worker.quotas == {"a": 500, "b": 500})


async def _stored(store: QuotaStore, blocks: dict[str, int]) -> bool:
    return dict((await store.read("unit-0")).blocks) == blocks


async def test_a_scheduler_that_restarts_keeps_the_quotas(setting: Setting) -> None:
    worker = await setting.worker(1000, {"a": shape(), "b": shape()})
    await setting.place(worker)
    change = admin_pb2.Quotas(unit="unit-0", revision=7, blocks={"a": 900, "b": 100})
    assert await QuotaStore(setting.redis).compare_and_set(change, 0, "admin", 1.0)
    await setting.scheduler()
    await eventually(lambda: worker.quotas == {"a": 900, "b": 100})
    assert worker.quota_revision >= 7


async def test_only_as_many_requests_are_pulled_as_may_soon_run(setting: Setting) -> None:
    worker = await setting.worker(1000, {"a": shape(slots=4)})
    await setting.place(worker)
    worker.gate.clear()
    gateway = FakeGateway(setting.queue)
    clients = [await gateway.ask("a", [n], 5) for n in range(4 + AHEAD * 4 + 12)]
    running = await setting.scheduler()
    await gateway.attach(running.address)
    await eventually(lambda: _depth(setting, 12))
    status = await running.status()
    assert (status.models[0].running, status.models[0].waiting) == (4, AHEAD * 4)
    worker.gate.set()
    async with asyncio.timeout(5):
        for client in clients:
            await client.done.wait()
            assert client.tokens == completion(client.request.prompt_tokens, 5)
    await gateway.detach()


async def _depth(setting: Setting, depth: int) -> bool:
    return await setting.queue.depth("a") == depth


async def test_a_unit_that_cannot_go_on_ends_the_scheduler(setting: Setting) -> None:
    worker = await setting.worker(200, {"a": shape(tokens_per_block=0)})
    await setting.place(worker)
    scheduler = Scheduler(SchedulerSettings(redis_url=setting.valkey.url), setting.redis)
    await setting.queue.admit(
        scheduler_pb2.QueuedRequest(
            request_id="r", model="a", gateway_id="g", prompt_tokens=[1], max_tokens=1
        ),
        10,
    )
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(10):
            await scheduler.run(lambda: None)
    assert caught.group_contains(ZeroDivisionError)


async def test_a_stream_that_does_not_begin_with_a_hello_is_refused(setting: Setting) -> None:
    running = await setting.scheduler()
    async with channel(running.address) as connection:
        call: Any = scheduler_pb2_grpc.SchedulerServiceStub(connection).Attach()
        await call.write(
            scheduler_pb2.AttachRequest(cancel=scheduler_pb2.AttachRequest.Cancel(request_id="x"))
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
