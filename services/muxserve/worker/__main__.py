"""`python -m muxserve.worker`: the worker process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine

import structlog

from muxserve.common.process import run
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.common.settings import load_settings
from muxserve.common.store import connect
from muxserve.engine.arena import ArenaError
from muxserve.engine.cuda.runtime import DeviceError
from muxserve.v1 import worker_pb2_grpc
from muxserve.worker.executors import ExecutorFailed
from muxserve.worker.service import SERVICE, WorkerServicer
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.worker import Worker

log = structlog.get_logger(__name__)

_GRACE = 0.5
"""Seconds that calls have to end in when the worker stops."""


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serve until `stop`. Raises ArenaError, DeviceError, ExecutorFailed or OSError if it cannot start."""
    entry = entry_of_this_process("worker", settings.id, "")
    worker = Worker(settings, entry.incarnation)
    server = RpcServer(settings.bind)
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, WorkerServicer(worker), SERVICE)
    try:
        entry.address = settings.advertised(await server.start())
        await _unless(stop, worker.start())
        redis = connect(settings.redis_url)
        if not stop.is_set():
            async with redis, Registry(redis).keep(entry):
                await server.set_serving(SERVICE, True)
                await _unless(stop, worker.broken())
        log.info("stopping")
    finally:
        await server.stop(_GRACE)
        await worker.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Returns when `work` has come to its end, or `stop` is set and `work` was cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait((working,))
        return
    working.result()


def main() -> int:
    """Exit code 0 after a signal, 1 if the worker could not start."""
    settings = load_settings(WorkerSettings)
    code = 0

    async def body(stop: asyncio.Event) -> None:
        nonlocal code
        try:
            await serve(settings, stop)
        except (ArenaError, DeviceError, ExecutorFailed, OSError) as error:
            log.error("cannot start", reason=str(error))
            code = 1

    run(body, settings.id, settings.log_level)
    return code


if __name__ == "__main__":
    sys.exit(main())
