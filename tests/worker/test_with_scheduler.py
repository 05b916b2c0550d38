"""A real worker behind a real scheduler: what only shows with both."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from muxserve.client import QuotaState
from muxserve.common.documents import PlacementStore, QuotaStore
from muxserve.common.queue import RequestQueue
from muxserve.scheduler.policy import POLICIES
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2
from tests.engine.model_factory import make_model
from tests.scheduler.conftest import Running, running
from tests.scheduler.fake_gateway import FakeGateway
from tests.support.valkey import ValkeyProcess
from tests.worker.harness import LIMIT, Harness, running_worker

UNIT = "unit-0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama` elsewhere, with more context: 6 blocks for 8 tokens."""
    return make_model("llama", tmp_path_factory.mktemp("llama"), head_dim=64, seed=1, context=1024)


@dataclass
class Serving:
    """A unit with one model "m"."""

    worker: Harness
    scheduler: Running
    gateway: FakeGateway

    async def answers(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """All asked at once; each one's tokens."""
        clients = [await self.gateway.ask("m", prompt, new) for prompt in prompts]
        async with asyncio.timeout(LIMIT):
            for client in clients:
                await client.done.wait()
        assert not any(client.failed for client in clients)
        return [client.tokens for client in clients]


@asynccontextmanager
async def serving(
    model: Path, redis: Redis, valkey: ValkeyProcess, policy: str = "mux", /, **settings: object
) -> AsyncIterator[Serving]:
    await redis.flushall()  # entries that were not acknowledged when the one before was taken down
    values: dict[str, object] = {"arena": 64 * 2**20, "slots": 40, "cores": 2} | settings
    async with running_worker(**values) as worker:
        shape = await worker.load("m", model)
        placed = admin_pb2.PlacedModel(
            config=common_pb2.ModelConfig(name="m", path="x"),
            state=inference_pb2.MODEL_STATE_READY,
            shape=shape,
        )
        unit = admin_pb2.Unit(unit=UNIT, worker_id="w", worker_address=worker.address, models=[placed])
        epoch = (await PlacementStore(redis).read()).epoch
        placement = admin_pb2.Placement(epoch=epoch + 1, units=[unit])
        assert await PlacementStore(redis).compare_and_set(epoch, placement)
        async with running(valkey.url, "scheduler-0", policy=policy) as scheduler:
            gateway = FakeGateway(RequestQueue(redis))
            await gateway.attach(scheduler.address)
            try:
                yield Serving(worker, scheduler, gateway)
            finally:
                await gateway.detach()
        await worker.assert_idle()


def conversations(count: int) -> list[list[int]]:
    """Prompts with 512 tokens in common, of 12 to 40 more."""
    chooser = random.Random(5)
    shared = [chooser.randrange(3, 200) for _ in range(512)]
    return [
        shared + [chooser.randrange(3, 200) for _ in range(chooser.randint(12, 40))] for _ in range(count)
    ]


async def test_a_common_prefix_is_computed_once_for_all_and_no_answer_changes(
    model: Path, redis_client: Redis, valkey: ValkeyProcess
) -> None:
    prompts = conversations(32)
    total = sum(map(len, prompts))
    async with serving(model, redis_client, valkey, prefix_cache=False) as cold:
        expected = await cold.answers(prompts, 16)
        assert (await cold.scheduler.status()).models[0].prefill_tokens >= total
    for policy in sorted(POLICIES):
        async with serving(model, redis_client, valkey, policy) as warm:
            assert await warm.answers(prompts, 16) == expected
            computed = (await warm.scheduler.status()).models[0].prefill_tokens
            assert computed <= 0.15 * total, (
                f"{policy}: those that come together share what is computed first"
            )
            assert await warm.answers(prompts, 16) == expected
            again = (await warm.scheduler.status()).models[0].prefill_tokens - computed
            assert again <= 0.08 * total


async def test_a_preempted_request_finds_what_it_had_computed(
    model: Path, redis_client: Redis, valkey: ValkeyProcess
) -> None:
    """An arena for a third of what is asked for: sequences give way and come back."""
    chooser = random.Random(6)
    prompts = [[chooser.randrange(3, 200) for _ in range(200)] for _ in range(12)]
    async with serving(model, redis_client, valkey, "adbs", prefix_cache=False) as calm:
        expected = await calm.answers(prompts, 200)
    async with serving(model, redis_client, valkey, "adbs", arena=5 * 2**20) as tight:
        assert await tight.answers(prompts, 200) == expected


@pytest.fixture
async def store(redis_client: Redis) -> QuotaStore:
    return QuotaStore(redis_client)


async def revision(store: QuotaStore, number: int) -> QuotaState:
    """What became of that revision."""
    found = next(each for each in await store.history(UNIT) if each.revision == number)
    return QuotaState[admin_pb2.QuotaState.Name(found.state).removeprefix("QUOTA_STATE_")]


async def ask(store: QuotaStore, blocks: int) -> int:
    """Set the quota of "m"; the revision."""
    before = (await store.read(UNIT)).revision
    quotas = admin_pb2.Quotas(unit=UNIT, revision=before + 1, blocks={"m": blocks})
    assert await store.compare_and_set(quotas, before, "admin", time.time())
    return before + 1


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await check():  # noqa: ASYNC110 (what is waited for is in another process)
            await asyncio.sleep(0.02)


async def test_a_quota_is_deferred_while_more_is_held_and_applied_when_it_is_given_back(
    model: Path, redis_client: Redis, valkey: ValkeyProcess, store: QuotaStore
) -> None:
    async with serving(model, redis_client, valkey) as unit:

        async def is_now(number: int, state: QuotaState) -> bool:
            return await revision(store, number) is state

        async def is_stored() -> bool:
            return bool((await store.read(UNIT)).revision)

        await eventually(is_stored)
        applied = await ask(store, 10_000)
        assert await revision(store, applied) is QuotaState.PENDING
        await eventually(lambda: is_now(applied, QuotaState.APPLIED))
        client = await unit.gateway.ask("m", [5] * 64, 900)
        await client.reach(8)
        async with unit.worker.stopped("decode"):
            small = await ask(store, 6)
            await eventually(lambda: is_now(small, QuotaState.DEFERRED))
            (newest, *_) = await store.history(UNIT)
            assert list(newest.above) == ["m"]
            blocks = (await unit.worker.info()).pool.models[0]
            assert (blocks.quota_blocks, blocks.borrowed_blocks) == (6, blocks.held_blocks - 6)
            assert not client.done.is_set(), "nothing is taken from anybody"
            await unit.gateway.cancel(client)
        await eventually(lambda: is_now(small, QuotaState.APPLIED))
        first, second = await ask(store, 7), await ask(store, 8)
        await eventually(lambda: is_now(second, QuotaState.APPLIED))
        assert await revision(store, first) is QuotaState.STALE
