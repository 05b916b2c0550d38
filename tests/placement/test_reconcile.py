"""What the loop makes of configuration, workers and failures; over a real Valkey, with peers as workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from redis.asyncio import Redis

from muxserve.common.documents import PlacementStore
from muxserve.common.errors import Aborted
from muxserve.common.registry import Registry
from muxserve.placement.document import FAILED, LOADING, READY, Place, Plan, PlannedModel
from muxserve.placement.errands import Errands
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, common_pb2
from tests.placement.peers import PeerWorker, eventually
from tests.support.valkey import ValkeyProcess


@asynccontextmanager
async def placing(redis: Redis, models: dict[str, str], workers: int = 1) -> AsyncIterator[Reconciler]:
    """A running reconciler for `models` (name to path)."""
    entries = [{"name": name, "path": path} for name, path in models.items()]
    settings = PlacementSettings(models=entries, workers=workers)
    calls = WorkerCalls(load_timeout=10)
    reconciler = Reconciler(settings, Registry(redis), PlacementStore(redis), calls)
    loop = asyncio.create_task(reconciler.run())
    try:
        yield reconciler
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop
        await calls.close()


async def until(
    redis: Redis, true: Callable[[admin_pb2.Placement], bool], limit: float = 10.0
) -> admin_pb2.Placement:
    """The first placement document for which `true` holds."""
    async with asyncio.timeout(limit):
        async for placement in PlacementStore(redis).watch():
            if true(placement):
                return placement
    raise AssertionError


def states(placement: admin_pb2.Placement) -> dict[str, int]:
    placed = [model for unit in placement.units for model in unit.models]
    return {model.config.name: model.state for model in (*placed, *placement.unplaced)}


def place_of(placement: admin_pb2.Placement) -> dict[str, str]:
    return {model.config.name: unit.worker_id for unit in placement.units for model in unit.models}


async def test_models_become_ready_on_the_only_worker(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    async with placing(redis_client, {"a": "100", "b": "50"}):
        waiting = await until(redis_client, lambda p: p.epoch > 0)
        assert states(waiting) == {"a": LOADING, "b": LOADING}
        async with worker.serve(Registry(redis_client)) as address:
            placement = await until(redis_client, lambda p: states(p) == {"a": READY, "b": READY})
    (unit,) = placement.units
    assert (unit.unit, unit.worker_id, unit.worker_address) == ("unit-worker-0", "worker-0", address)
    assert unit.models[0].shape.context_length == 2048
    assert sorted(worker.loads) == ["a", "b"]


async def test_two_models_spread_over_two_workers_whichever_comes_first(redis_client: Redis) -> None:
    workers = [PeerWorker("worker-0"), PeerWorker("worker-1")]
    async with placing(redis_client, {"a": "100", "b": "100"}, workers=2), AsyncExitStack() as stack:
        await stack.enter_async_context(workers[0].serve(Registry(redis_client)))
        await asyncio.sleep(1.0)
        assert not workers[0].loads
        await stack.enter_async_context(workers[1].serve(Registry(redis_client)))
        placement = await until(redis_client, lambda p: states(p) == {"a": READY, "b": READY})
    assert sorted(place_of(placement).values()) == ["worker-0", "worker-1"]


async def test_a_refused_model_says_why_and_the_others_are_served(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0", budget_mib=120)
    models = {"good": "100", "big": "500", "broken": "no/such/file"}
    done = {"good": READY, "big": FAILED, "broken": FAILED}
    async with worker.serve(Registry(redis_client)), placing(redis_client, models):
        placement = await until(redis_client, lambda p: states(p) == done)
        unplaced = {model.config.name: model for model in placement.unplaced}
        assert "500.0 MiB" in unplaced["big"].reason and "worker-0" in unplaced["big"].reason
        assert (unplaced["broken"].field, unplaced["broken"].reason) == (
            "path",
            '"no/such/file" is no checkpoint',
        )


async def test_a_worker_that_comes_later_takes_what_did_not_fit(redis_client: Redis) -> None:
    small, big = PeerWorker("worker-0", budget_mib=120), PeerWorker("worker-1", budget_mib=600)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(small.serve(Registry(redis_client)))
        await stack.enter_async_context(placing(redis_client, {"a": "100", "big": "500"}))
        await until(redis_client, lambda p: states(p) == {"a": READY, "big": FAILED})
        await stack.enter_async_context(big.serve(Registry(redis_client)))
        placement = await until(redis_client, lambda p: states(p) == {"a": READY, "big": READY})
    assert place_of(placement) == {"a": "worker-0", "big": "worker-1"}


async def test_a_new_process_of_a_worker_loads_its_models_again(redis_client: Redis) -> None:
    ready = {"a": READY}
    async with placing(redis_client, {"a": "100"}):
        async with PeerWorker("worker-0").serve(Registry(redis_client)) as address:
            first = await until(redis_client, lambda p: states(p) == ready)
        successor = PeerWorker("worker-0")
        async with successor.serve(Registry(redis_client), address):
            old = first.units[0].worker_incarnation
            second = await until(
                redis_client, lambda p: states(p) == ready and p.units[0].worker_incarnation != old
            )
    assert second.epoch > first.epoch
    assert successor.loads == ["a"]


async def test_models_of_a_worker_that_is_gone_wait_for_it(redis_client: Redis) -> None:
    async with placing(redis_client, {"a": "100"}):
        async with PeerWorker("worker-0").serve(Registry(redis_client)):
            await until(redis_client, lambda p: states(p) == {"a": READY})
        placement = await until(redis_client, lambda p: states(p) == {"a": LOADING})
    assert placement.units[0].models[0].reason == "worker-0 is away"


async def test_a_new_placement_process_goes_on_without_loading_again(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    async with worker.serve(Registry(redis_client)):
        async with placing(redis_client, {"a": "100", "old": "10"}):
            before = await until(redis_client, lambda p: states(p) == {"a": READY, "old": READY})
        worker.loads.clear()
        async with placing(redis_client, {"a": "100", "new": "20"}):
            after = await until(redis_client, lambda p: states(p) == {"a": READY, "new": READY})

            async def tidy() -> bool:
                return worker.loaded.keys() == {"a", "new"}

            await eventually(tidy)
    assert worker.loads == ["new"]
    assert after.epoch > before.epoch


async def test_a_changed_configuration_replaces_what_is_loaded(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    async with worker.serve(Registry(redis_client)):
        async with placing(redis_client, {"a": "100"}):
            await until(redis_client, lambda p: states(p) == {"a": READY})
        async with placing(redis_client, {"a": "200"}):
            await until(
                redis_client,
                lambda p: states(p) == {"a": READY} and p.units[0].models[0].config.path == "200",
            )
    assert worker.loaded["a"].path == "200"


async def test_a_redis_that_was_away_changes_nothing(redis_client: Redis, valkey: ValkeyProcess) -> None:
    worker = PeerWorker("worker-0")
    async with worker.serve(Registry(redis_client)), placing(redis_client, {"a": "100"}) as reconciler:
        before = await until(redis_client, lambda p: states(p) == {"a": READY})
        valkey.kill()
        # Longer than entries live: a worker that cannot announce itself is not a dead worker.
        await asyncio.sleep(4.0)
        valkey.start()
        await asyncio.sleep(2.0)
        assert reconciler.placement == before
        assert await PlacementStore(redis_client).read() == before
    assert worker.loads == ["a"]


async def test_a_document_that_redis_lost_is_written_again(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    async with worker.serve(Registry(redis_client)), placing(redis_client, {"a": "100"}):
        before = await until(redis_client, lambda p: states(p) == {"a": READY})
        await redis_client.flushall()
        await until(redis_client, lambda p: p.epoch > before.epoch and states(p) == {"a": READY})


async def test_whoever_takes_the_document_over_has_what_follows_from_the_older_one_refused(
    redis_client: Redis,
) -> None:
    worker, models = PeerWorker("worker-0"), {"a": "100"}
    async with worker.serve(Registry(redis_client)) as address:
        async with placing(redis_client, models):
            before = await until(redis_client, lambda p: states(p) == {"a": READY})
        async with placing(redis_client, models):

            async def told() -> bool:
                return worker.fence.epoch > before.epoch

            await eventually(told)
        calls = WorkerCalls(load_timeout=10)
        with pytest.raises(Aborted, match="there is a placement"):
            await calls.unload(address, "a", before.epoch)
        await calls.close()
    assert worker.loads == ["a"] and list(worker.loaded) == ["a"]


async def test_a_load_that_follows_from_an_older_document_changes_nothing(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    plan = Plan({"a": PlannedModel(common_pb2.ModelConfig(name="a", path="100"))})
    place = plan.models["a"].add(Place("worker-0"))
    refused = asyncio.Event()
    async with worker.serve(Registry(redis_client)) as address:
        calls, entry = WorkerCalls(load_timeout=10), admin_pb2.ServiceEntry(id="worker-0", address=address)
        errands = Errands(calls, refused.set, lambda epoch: None)
        worker.fence.hear(8)
        errands.follow(plan, {"worker-0": entry}, 7)
        await asyncio.wait_for(refused.wait(), 10)
        assert not worker.loads and place.state == LOADING
        errands.follow(plan, {"worker-0": entry}, 8)

        async def loaded() -> bool:
            return place.state == READY

        await eventually(loaded)
        await errands.close()
        await calls.close()


async def test_epochs_go_on_from_those_of_workers_where_the_document_is_lost(redis_client: Redis) -> None:
    worker = PeerWorker("worker-0")
    worker.fence.hear(100)
    async with worker.serve(Registry(redis_client)), placing(redis_client, {"a": "100"}):
        placement = await until(redis_client, lambda p: states(p) == {"a": READY})
    assert placement.epoch > 100
