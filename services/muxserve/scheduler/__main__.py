"""`python -m muxserve.scheduler`: the scheduler as a process."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import structlog

from muxserve.common import process
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.common.settings import load_settings
from muxserve.common.store import connect
from muxserve.scheduler.scheduler import Scheduler
from muxserve.scheduler.service import SERVICE, SchedulerServicer
from muxserve.scheduler.settings import SchedulerSettings
from muxserve.v1 import scheduler_pb2_grpc

GRACE = 0.2
"""Seconds that streams have left when the service stops; gateways attach again elsewhere."""


async def serve(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    log = structlog.get_logger(__name__)
    redis = connect(settings.redis_url)
    scheduler = Scheduler(settings, redis)
    server = RpcServer(settings.bind)
    server.add(
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, SchedulerServicer(scheduler), SERVICE
    )
    address = settings.advertised(await server.start())
    log.info("serving", address=address, policy=settings.policy)
    ready = asyncio.Event()
    async with Registry(redis).keep(entry_of_this_process("scheduler", settings.id, address)):
        running = asyncio.create_task(scheduler.run(ready.set), name="scheduler")
        waits = [asyncio.create_task(ready.wait()), asyncio.create_task(stop.wait())]
        await asyncio.wait((running, *waits), return_when=asyncio.FIRST_COMPLETED)
        await server.set_serving(SERVICE, ready.is_set())
        await asyncio.wait((running, waits[1]), return_when=asyncio.FIRST_COMPLETED)
        for task in (running, *waits):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await server.stop(GRACE)
    await redis.aclose()


def main() -> None:
    settings = load_settings(SchedulerSettings)
    process.run(partial(serve, settings), settings.id, settings.log_level)


if __name__ == "__main__":
    main()
