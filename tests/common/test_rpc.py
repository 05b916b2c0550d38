"""The server that every service has: health as clients watch it."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxserve.common.rpc import RpcServer, channel

NAME = "muxserve.v1.Test"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_who_watches_health_is_told_though_others_leave() -> None:
    server = RpcServer("127.0.0.1:0", with_reflection=False)
    server.add(lambda _servicer, _server: None, object(), NAME)
    address = await server.start()
    async with asyncio.timeout(20), channel(address) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection)
        leaving, staying, late = (stub.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(3))
        assert [(await watch.read()).status for watch in (leaving, staying, late)] == [NOT_SERVING] * 3
        leaving.cancel()
        while server._health._watching[NAME] > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await server.set_serving(NAME, True)
        assert [(await watch.read()).status for watch in (staying, late)] == [SERVING] * 2
        for watch in (staying, late):
            watch.cancel()
        while server._health._watching:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert NAME not in server._health._server_watchers, "nothing is kept of those who have left"
    await server.stop(0.1)
