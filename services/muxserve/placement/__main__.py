"""`python -m muxserve.placement`: the placement service as a process."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import structlog

from muxserve.common import process
from muxserve.common.documents import PlacementStore, QuotaStore
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.common.settings import load_settings
from muxserve.common.store import connect
from muxserve.placement.advisor_loop import Rebalancer, starter
from muxserve.placement.advisor_watch import Watch
from muxserve.placement.drains import Drains
from muxserve.placement.migrations import Migrations
from muxserve.placement.reconcile import Reconciler
from muxserve.placement.residency_demand import Demand
from muxserve.placement.residency_keeper import Keeper
from muxserve.placement.service import AdminServicer
from muxserve.placement.settings import PlacementSettings
from muxserve.placement.traffic import Traffic
from muxserve.placement.workers import WorkerCalls
from muxserve.v1 import admin_pb2, admin_pb2_grpc

GRACE = 2.0
"""Seconds that running calls have left when the service stops."""


async def serve(settings: PlacementSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    log = structlog.get_logger(__name__)
    redis = connect(settings.redis_url)
    registry, calls = Registry(redis), WorkerCalls(settings.load_timeout)
    reconciler = Reconciler(settings, registry, PlacementStore(redis), calls)
    keeper = Keeper(settings, Demand(redis, registry), calls, reconciler.wake)
    reconciler.advisers.append(keeper)
    migrations = Migrations(reconciler, calls, settings.drain_seconds)
    drains = Drains(migrations, reconciler, calls)
    expected = {model.name: model.rate for model in settings.models if model.rate}
    watch = Watch(redis, registry, calls, Traffic(expected))
    rebalancer = Rebalancer(settings, lambda: reconciler.placement, watch, starter(reconciler, settings))
    quotas = QuotaStore(redis)
    servicer = AdminServicer(
        lambda: reconciler.placement, registry, quotas, calls, migrations, drains, rebalancer.plan
    )
    server = RpcServer(settings.bind)
    name = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
    server.add(admin_pb2_grpc.add_AdminServiceServicer_to_server, servicer, name)
    bound = await server.start()
    await server.set_serving(name, True)
    address = settings.advertised(bound)
    log.info("serving", address=address, models=[model.name for model in settings.models])
    async with registry.keep(entry_of_this_process("placement", settings.id, address)):
        loop = asyncio.create_task(reconciler.run(), name="reconciler")
        balancing = asyncio.create_task(rebalancer.run(), name="rebalancer")
        ended = asyncio.create_task(stop.wait())
        await asyncio.wait((loop, balancing, ended), return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, balancing, loop):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(loop, balancing)
        await server.stop(GRACE)
    await drains.close()
    await servicer.close()
    await watch.close()
    await keeper.close()
    await calls.close()
    await redis.aclose()


def main() -> None:
    settings = load_settings(PlacementSettings)
    process.run(partial(serve, settings), settings.id, settings.log_level)


if __name__ == "__main__":
    main()
