"""What operators ask of a running placement service, over gRPC and a real Valkey, with peers as workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from muxserve.client import (
    AsyncAdminClient,
    FailedPrecondition,
    InvalidRequest,
    MigrationEvent,
    MigrationPhase,
    ModelState,
    Move,
    NotFound,
    Placement,
)
from muxserve.common.registry import Registry
from muxserve.placement.__main__ import serve
from muxserve.placement.settings import PlacementSettings
from tests.placement.peers import PeerWorker, eventually
from tests.support.valkey import ValkeyProcess


@dataclass
class Site:
    """A placement service and two workers; model "a" is on worker-0, "b" on worker-1."""

    redis: Redis
    valkey: ValkeyProcess
    workers: list[PeerWorker]
    models: list[dict[str, Any]]
    client: AsyncAdminClient = field(init=False)

    @asynccontextmanager
    async def placement(self, **settings: Any) -> AsyncIterator[AsyncAdminClient]:
        """The service, in this process."""
        chosen = PlacementSettings(
            models=self.models, workers=2, redis_url=self.valkey.url, rebalance="off", **settings
        )
        registry, stop = Registry(self.redis), asyncio.Event()
        service = asyncio.create_task(serve(chosen, stop))

        async def announced() -> bool:
            return any(entry.id == chosen.id for entry in await registry.list("placement"))

        await eventually(announced)
        entry = next(e for e in await registry.list("placement") if e.id == chosen.id)
        try:
            async with AsyncAdminClient(entry.address) as client:
                self.client = client
                yield client
        finally:
            stop.set()
            async with asyncio.timeout(5):
                await service

    async def until(self, *places: str) -> Placement:
        """Wait until exactly these places are READY: "model@worker"."""
        found: list[Placement] = []

        async def so() -> bool:
            found.append(await self.client.placement())
            return sorted(places) == sorted(
                f"{model.config.name}@{unit.worker_id}"
                for unit in found[-1].units
                for model in unit.models
                if model.state is ModelState.READY
            ) and len(places) == sum(len(unit.models) for unit in found[-1].units)

        await eventually(so)
        return found[-1]


@asynccontextmanager
async def site(
    redis: Redis, valkey: ValkeyProcess, budgets: tuple[int, int] = (0, 0), **config: Any
) -> AsyncIterator[Site]:
    """Both models ready."""
    workers = [PeerWorker(f"worker-{number}", budget) for number, budget in enumerate(budgets)]
    models = [{"name": "a", "path": "100", "rate": 2.0, **config}, {"name": "b", "path": "90"}]
    made = Site(redis, valkey, workers, models)
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.serve(Registry(redis)))
        await stack.enter_async_context(made.placement(drain_seconds=0.2))
        await made.until("a@worker-0", "b@worker-1")
        yield made


def phases(events: list[MigrationEvent]) -> list[str]:
    return [str(event.migration.phase) for event in events]


async def collect(events: AsyncIterator[MigrationEvent]) -> list[MigrationEvent]:
    return [event async for event in events]


async def test_a_model_moves_and_every_phase_is_told(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with site(redis_client, valkey) as made:
        made.workers[0].open["a"] = 1
        moving = asyncio.create_task(collect(made.client.rebalance([Move("a", "worker-1")])))

        async def draining() -> bool:
            now = (await made.client.placement()).migration
            return now is not None and now.phase is MigrationPhase.DRAINING

        await eventually(draining)
        assert made.workers[0].loaded.keys() == {"a"}
        made.workers[0].open.clear()
        events = await moving
        assert phases(events) == ["loading", "handing_over", "draining", "unloading", "done"]
        assert (events[-1].ended, events[-1].total) == (1, 1)
        placement = await made.until("a@worker-1", "b@worker-1")
        assert placement.ended[0].author == "admin"
        assert not made.workers[0].loaded


async def test_moves_follow_one_another(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with site(redis_client, valkey) as made:
        events = await collect(made.client.rebalance([Move("a", "worker-1"), Move("b", "worker-0")]))
        under_way = [event.migration.model for event in events if event.migration.phase == "loading"]
        assert under_way == ["a", "b"]
        assert (events[-1].ended, events[-1].total) == (2, 2)
        await made.until("a@worker-1", "b@worker-0")


async def test_load_and_unload_make_and_end_a_replica(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with site(redis_client, valkey) as made:
        assert phases(await collect(made.client.load("a", "worker-1")))[-1] == "done"
        await made.until("a@worker-0", "a@worker-1", "b@worker-1")
        assert await collect(made.client.load("a", "worker-1")) == []
        with pytest.raises(InvalidRequest, match="worker-0, worker-1") as caught:
            await collect(made.client.unload("a"))
        assert caught.value.field == "worker"
        assert phases(await collect(made.client.unload("a", "worker-0")))[-1] == "done"
        await made.until("a@worker-1", "b@worker-1")


async def test_the_only_place_of_a_model_falls_asleep_and_is_woken(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey) as made:
        assert phases(await collect(made.client.unload("a")))[-1] == "done"
        (unit, _) = (await made.client.placement()).units
        assert [model.state for model in unit.models] == [ModelState.ASLEEP]
        assert not made.workers[0].loaded
        assert phases(await collect(made.client.load("a", "worker-0")))[-1] == "done"
        await made.until("a@worker-0", "b@worker-1")


async def test_a_pinned_model_stays_loaded(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with site(redis_client, valkey) as made:
        await made.client.pin("a")
        with pytest.raises(FailedPrecondition, match="pinned"):
            await collect(made.client.unload("a"))
        await collect(made.client.load("a", "worker-1"))
        await collect(made.client.unload("a", "worker-0"))
        await made.client.unpin("a")
        assert (await made.client.placement()).pinned == {"a": False}
        assert phases(await collect(made.client.unload("a")))[-1] == "done"


async def test_what_cannot_be_is_refused_by_name_and_changes_nothing(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey, budgets=(120, 120)) as made:
        before = await made.client.placement()
        with pytest.raises(NotFound, match="nosuch") as missing:
            await collect(made.client.rebalance([Move("nosuch", "worker-1")]))
        assert missing.value.field == "model"
        with pytest.raises(NotFound, match="nosuch") as missing:
            await collect(made.client.load("a", "nosuch"))
        assert missing.value.field == "worker"
        with pytest.raises(InvalidRequest) as bad:
            await collect(made.client.rebalance([Move("a")]))
        assert bad.value.field == "moves[0].target_worker"
        with pytest.raises(InvalidRequest) as bad:
            await collect(made.client.unload("a", drain_seconds=-1.0))
        assert bad.value.field == "drain_seconds"
        with pytest.raises(FailedPrecondition, match="no room"):
            await collect(made.client.rebalance([Move("a", "worker-1")]))
        with pytest.raises(FailedPrecondition, match="already"):
            await collect(made.client.rebalance([Move("a", "worker-0")]))
        with pytest.raises(NotFound):
            await made.client.cancel()
        with pytest.raises(NotFound):
            await made.client.pin("nosuch")
        with pytest.raises(NotFound):
            await made.client.undrain("nosuch")
        assert await made.client.placement() == before


async def test_one_migration_at_a_time(redis_client: Redis, valkey: ValkeyProcess) -> None:
    async with site(redis_client, valkey) as made:
        made.workers[1].release.clear()
        moving = asyncio.create_task(collect(made.client.rebalance([Move("a", "worker-1")])))
        await eventually(lambda: _loading(made))
        with pytest.raises(FailedPrecondition, match="already under way"):
            await collect(made.client.load("b", "worker-0"))
        made.workers[1].release.set()
        assert phases(await moving)[-1] == "done"


async def _loading(made: Site) -> bool:
    return made.workers[1].loads.count("a") == 1


async def test_a_cancelled_move_leaves_everything_as_it_was(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey) as made:
        made.workers[1].release.clear()
        orders = [Move("a", "worker-1"), Move("b", "worker-0")]
        moving = asyncio.create_task(collect(made.client.rebalance(orders)))
        await eventually(lambda: _loading(made))
        assert (await made.client.cancel()).phase is MigrationPhase.ROLLING_BACK
        events = await moving
        assert phases(events)[-1] == "rolled_back"
        assert events[-1].migration.error == "cancelled"
        await made.until("a@worker-0", "b@worker-1")
        made.workers[1].release.set()


async def test_a_worker_that_refuses_a_model_keeps_it_where_it_is(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey) as made:
        made.workers[1].refuse = True
        events = await collect(made.client.rebalance([Move("a", "worker-1")]))
        assert phases(events)[-1] == "rolled_back"
        assert "bad luck" in events[-1].migration.error
        await made.until("a@worker-0", "b@worker-1")


async def test_a_drained_worker_is_empty_and_gets_nothing_until_that_is_undone(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey) as made:
        events = [event async for event in made.client.drain("worker-0")]
        assert [e.migration.phase for e in events if e.migration][-1] is MigrationPhase.DONE
        assert (events[-1].models_left, events[-1].held_blocks) == (0, 0)
        placement = await made.until("a@worker-1", "b@worker-1")
        assert placement.drained_workers == ("worker-0",)
        assert not made.workers[0].loaded
        with pytest.raises(FailedPrecondition, match="drained"):
            await collect(made.client.load("a", "worker-0"))
        await made.client.undrain("worker-0")
        assert phases(await collect(made.client.load("a", "worker-0")))[-1] == "done"


async def test_a_replica_elsewhere_makes_draining_an_unload(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey) as made:
        await collect(made.client.load("a", "worker-1"))
        loads = list(made.workers[1].loads)
        events = [event async for event in made.client.drain("worker-0")]
        assert {e.migration.target for e in events if e.migration} == {""}
        assert made.workers[1].loads == loads
        await made.until("a@worker-1", "b@worker-1")


async def test_a_worker_whose_models_have_nowhere_to_go_is_not_drained(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    async with site(redis_client, valkey, budgets=(120, 120), pinned=True) as made:
        before = await made.client.placement()
        with pytest.raises(FailedPrecondition, match='"a" has nowhere to go'):
            _ = [event async for event in made.client.drain("worker-0")]
        assert await made.client.placement() == before


@pytest.mark.parametrize("phase", ["loading", "handing_over", "draining", "unloading"])
async def test_a_migration_and_a_drain_go_on_in_a_new_placement_process(
    redis_client: Redis, valkey: ValkeyProcess, phase: str
) -> None:
    workers = [PeerWorker("worker-0"), PeerWorker("worker-1")]
    made = Site(
        redis_client,
        valkey,
        workers,
        [{"name": "a", "path": "100", "rate": 2.0}, {"name": "b", "path": "90"}],
    )
    async with AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker.serve(Registry(redis_client)))
        async with made.placement(drain_seconds=0.0 if phase == "draining" else 30.0) as client:
            await made.until("a@worker-0", "b@worker-1")
            workers[0].open["a"] = int(phase in ("handing_over", "draining"))
            workers[0].stuck = phase == "unloading"
            if phase == "loading":
                workers[1].release.clear()
            events = client.drain("worker-0")
            async for event in events:
                if event.migration is not None and event.migration.phase == phase:
                    break
        workers[0].open.clear()
        workers[0].stuck = False
        workers[1].release.set()
        async with made.placement():
            await made.until("a@worker-1", "b@worker-1")
            assert not workers[0].loaded


async def test_of_two_placement_processes_the_newer_word_counts(
    redis_client: Redis, valkey: ValkeyProcess
) -> None:
    """Two run at once for a while when one is replaced: neither undoes what the other did."""
    async with site(redis_client, valkey) as made, made.placement(id="placement-1"):
        newer = made.client
        assert phases(await collect(newer.rebalance([Move("a", "worker-1")])))[-1] == "done"
        await made.until("a@worker-1", "b@worker-1")
        await collect(newer.load("b", "worker-0"))
        await made.until("a@worker-1", "b@worker-0", "b@worker-1")
