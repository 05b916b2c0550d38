"""`python -m muxserve.gateway`: the gateway as a process."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from functools import partial

import structlog

from muxserve.common import process
from muxserve.common.documents import PlacementStore
from muxserve.common.queue import RequestQueue
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.common.settings import load_settings
from muxserve.common.store import connect
from muxserve.gateway.gateway import Gateway
from muxserve.gateway.service import SERVICE, InferenceServicer
from muxserve.gateway.settings import GatewaySettings
from muxserve.v1 import inference_pb2_grpc

GRACE = 1.0
"""Seconds that calls have to end in after the requests in flight are drained."""


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises OSError if the address is taken."""
    log = structlog.get_logger(__name__)
    server = RpcServer(settings.bind, max_message_bytes=settings.max_message_bytes)
    async with connect(settings.redis_url) as redis:
        registry = Registry(redis)
        entry = entry_of_this_process("gateway", settings.id, "")
        gateway = Gateway(
            settings,
            f"{settings.id}/{entry.incarnation}",
            registry,
            PlacementStore(redis),
            RequestQueue(redis),
        )
        server.add(
            inference_pb2_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(gateway), SERVICE
        )
        entry.address = settings.advertised(await server.start())
        log.info("listening", address=entry.address)
        async with registry.keep(entry):
            work = asyncio.create_task(_work(gateway, server), name="gateway")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not work.done():
                log.info("stopping")
                await server.set_serving(SERVICE, False)
                await gateway.drain()
                work.cancel()
            await server.stop(GRACE)
            with suppress(asyncio.CancelledError):
                await work


async def _work(gateway: Gateway, server: RpcServer) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gateway.run(), name="gateway work")
        tasks.create_task(_report_readiness(gateway, server), name="readiness")


async def _report_readiness(gateway: Gateway, server: RpcServer) -> None:
    reported = False
    while True:
        await gateway.wait_for_change()
        if gateway.ready != reported:
            reported = gateway.ready
            structlog.get_logger(__name__).info("ready" if reported else "not ready")
            await server.set_serving(SERVICE, reported)


def main() -> int:
    """Exit code 0 after a signal, 1 if the gateway cannot listen."""
    settings = load_settings(GatewaySettings)
    try:
        process.run(partial(serve, settings), settings.id, settings.log_level)
    except OSError as error:
        structlog.get_logger(__name__).error("cannot start", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
