"""Sleeping and waking through the reconciler: a real Valkey with queues, and peers as workers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from redis.asyncio import Redis

from muxserve.common.documents import PlacementStore
from muxserve.common.queue import RequestQueue
from muxserve.common.registry import Registry
from muxserve.placement.advisor_loop import starter
from muxserve.placement.advisor_situation import Move
from muxserve.placement.document import ASLEEP, LOADING, READY
from muxserve.placement.errands import BACKOFF
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.residency_demand import Demand
from muxserve.placement.residency_keeper import Keeper
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, scheduler_pb2
from tests.placement.peers import PeerWorker, eventually
from tests.placement.test_reconcile import place_of, states, until

Model = dict[str, Any]


@asynccontextmanager
async def keeping(redis: Redis, *models: Model, residency: float = 0.5) -> AsyncIterator[Reconciler]:
    """A running reconciler with a keeper, for models of 100 MiB unless they say otherwise."""
    entries = [{"path": "100", **model} for model in models]
    settings = PlacementSettings.model_validate(
        {"models": entries, "residency": residency, "residency_factor": 0, "worker_wait": 0}
    )
    calls = WorkerCalls(load_timeout=10)
    reconciler = Reconciler(settings, Registry(redis), PlacementStore(redis), calls)
    keeper = Keeper(settings, Demand(redis, Registry(redis)), calls, reconciler.wake)
    reconciler.advisers.append(keeper)
    loop = asyncio.create_task(reconciler.run())
    try:
        yield reconciler
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop
        await keeper.close()
        await calls.close()


def placed(placement: admin_pb2.Placement, name: str) -> admin_pb2.PlacedModel:
    return next(m for unit in placement.units for m in unit.models if m.config.name == name)


async def ask(redis: Redis, model: str) -> str:
    """A request that waits; its entry."""
    request = scheduler_pb2.QueuedRequest(request_id=f"r{time.monotonic_ns()}", model=model)
    return await RequestQueue(redis).admit(request, 10)


async def test_models_that_do_not_fit_sleep_and_a_request_wakes_one_for_another(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0", budget_mib=250)
    names = ("a", "b", "c")
    async with worker.serve(Registry(redis_client)):
        models: list[Model] = [{"name": "a", "pinned": True}, {"name": "b"}, {"name": "c"}]
        async with keeping(redis_client, *models):
            done = {"a": READY, "b": READY, "c": ASLEEP}
            placement = await until(redis_client, lambda p: states(p) == done)
            assert placed(placement, "c").expected_wait_seconds > 0
            worker.release.clear()
            entry = await ask(redis_client, "c")
            waking = await until(redis_client, lambda p: placed(p, "c").state == LOADING)
            assert placed(waking, "b").state == ASLEEP
            assert placed(waking, "c").expected_wait_seconds > 0  # so that others may join
            worker.release.set()
            woken = await until(redis_client, lambda p: states(p) == {"a": READY, "b": ASLEEP, "c": READY})
            assert placed(woken, "c").expected_wait_seconds == 0
            assert [placed(woken, name).loads for name in names] == [1, 1, 1]
            await RequestQueue(redis_client).withdraw("c", entry)
    assert worker.loads == ["a", "b", "c"] and worker.loaded.keys() == {"a", "c"}


async def test_the_document_says_when_there_will_be_room(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0", budget_mib=100)
    both = keeping(redis_client, {"name": "a"}, {"name": "b"}, residency=60.0)
    async with worker.serve(Registry(redis_client)), both as reconciler:
        placement = await until(
            redis_client,
            lambda p: states(p) == {"a": READY, "b": ASLEEP} and placed(p, "b").room_at_unix_ms > 0,
        )
        wait = placed(placement, "b").room_at_unix_ms / 1000 - time.time()
        assert 25 < wait <= 30  # half of the residency: nobody uses what is loaded
        assert reconciler.plan is not None
        reconciler.plan.pins["a"] = True
        reconciler.wake()
        await until(redis_client, lambda p: placed(p, "b").expected_wait_seconds == math.inf)


async def test_a_new_placement_process_goes_on_where_models_sleep_and_wake(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0", budget_mib=100)
    models: list[Model] = [{"name": "a"}, {"name": "b"}]
    async with worker.serve(Registry(redis_client)):
        async with keeping(redis_client, *models):
            await until(redis_client, lambda p: states(p) == {"a": READY, "b": ASLEEP})
            worker.release.clear()
            entry = await ask(redis_client, "b")
            await until(redis_client, lambda p: states(p) == {"a": ASLEEP, "b": LOADING})
        worker.release.set()
        async with keeping(redis_client, *models):
            await until(redis_client, lambda p: states(p) == {"a": ASLEEP, "b": READY})
            await RequestQueue(redis_client).withdraw("b", entry)
            await ask(redis_client, "a")
            await until(redis_client, lambda p: states(p) == {"a": READY, "b": ASLEEP})
    assert worker.loaded.keys() == {"a"}


async def test_a_model_that_found_no_room_when_it_was_woken_sleeps_on_and_is_woken_again(
    redis_client: Redis,
) -> None:
    """Rate 13 is what peers refuse: as if something else were in its room."""
    worker = PeerWorker("worker-0", budget_mib=100)
    both = keeping(redis_client, {"name": "a", "priority": 1}, {"name": "b", "rate": 13})
    async with worker.serve(Registry(redis_client)), both:
        await until(redis_client, lambda p: states(p) == {"a": READY, "b": ASLEEP})
        await ask(redis_client, "b")
        began = time.monotonic()

        async def tried_thrice() -> bool:
            return worker.loads.count("b") >= 3

        await eventually(tried_thrice)
        assert time.monotonic() - began >= 2 * BACKOFF, "not without a rest"
        now = await until(redis_client, lambda p: True)
        assert placed(now, "b").state in (ASLEEP, LOADING), "it has not failed"


@asynccontextmanager
async def full_workers(redis: Redis) -> AsyncIterator[tuple[list[PeerWorker], Reconciler]]:
    """Two workers with two of the models a, b, c and d each, and no room for more."""
    workers = [PeerWorker(f"worker-{number}", budget_mib=250) for number in range(2)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.serve(Registry(redis)))
        models = [{"name": name} for name in "abcd"]
        reconciler = await stack.enter_async_context(keeping(redis, *models))
        await until(redis, lambda p: set(states(p).values()) == {READY})
        yield workers, reconciler


def move(reconciler: Reconciler, *moves: Move) -> None:
    starter(reconciler, PlacementSettings.model_validate({"models": [{"name": "a", "path": "1"}]}))(
        moves, "a test"
    )


async def test_models_that_change_places_are_not_woken_where_they_make_room(redis_client: Redis) -> None:
    """Though requests wait for the one that sleeps on the way."""
    async with full_workers(redis_client) as (workers, reconciler):
        one, other = (next(name for name in "abcd" if name in worker.loaded) for worker in workers)
        here, there = (worker.worker_id for worker in workers)
        await ask(redis_client, one)
        move(reconciler, Move(one, here), Move(other, there, here), Move(one, "", there))
        wanted = {(one, there), (other, here)}

        def done(placement: admin_pb2.Placement) -> bool:
            return not placement.HasField("migration") and not placement.planned and len(placement.ended) == 3

        placement = await until(redis_client, done)
        assert wanted <= {(m.config.name, u.worker_id) for u in placement.units for m in u.models}
        await until(redis_client, lambda p: set(states(p).values()) == {READY})
        assert [workers[0].loads.count(name) for name in (one, other)] == [1, 1]
        assert [workers[1].loads.count(name) for name in (one, other)] == [1, 1]
        assert workers[0].loads[2:] == [other] and workers[1].loads[2:] == [one], "nobody else was moved"


async def test_a_model_that_is_woken_at_once_says_that_requests_may_wait(redis_client: Redis) -> None:
    async with full_workers(redis_client) as (workers, reconciler):
        seen: list[admin_pb2.PlacedModel] = []

        async def watch() -> None:
            epoch = 0
            while True:
                placement = await reconciler.changed(epoch)
                epoch = placement.epoch
                seen.append(placed(placement, "a"))

        watching = asyncio.create_task(watch())
        await ask(redis_client, "a")
        home = next(worker for worker in workers if "a" in worker.loaded)
        move(reconciler, Move("a", home.worker_id))
        await until(redis_client, lambda p: placed(p, "a").loads == 2 and placed(p, "a").state == READY)
        watching.cancel()
        assert {LOADING, ASLEEP} <= {model.state for model in seen}
        assert all(model.expected_wait_seconds > 0 for model in seen if model.state == LOADING)


async def test_replicas_that_have_to_be_loaded_get_their_places(redis_client: Redis) -> None:
    workers = [PeerWorker(f"worker-{number}", budget_mib=100) for number in range(2)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.serve(Registry(redis_client)))
        await stack.enter_async_context(keeping(redis_client, {"name": "a", "min_resident": 2}))
        ready = [READY, READY]
        placement = await until(
            redis_client, lambda p: [m.state for unit in p.units for m in unit.models] == ready
        )
    assert place_of(placement)["a"] and [list(worker.loaded) for worker in workers] == [["a"], ["a"]]


async def test_a_model_sleeps_after_its_keep_alive_and_wakes_for_the_next_request(
    redis_client: Redis,
) -> None:
    worker = PeerWorker("worker-0")
    model = keeping(redis_client, {"name": "a", "keep_alive": 0.5})
    async with worker.serve(Registry(redis_client)), model:
        await until(redis_client, lambda p: states(p) == {"a": READY})
        await until(redis_client, lambda p: states(p) == {"a": ASLEEP})
        await ask(redis_client, "a")
        await until(redis_client, lambda p: states(p) == {"a": READY})
