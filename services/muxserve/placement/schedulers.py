"""Calls to schedulers, each with a deadline."""

from __future__ import annotations

import grpc

from muxserve.common.errors import from_rpc_error
from muxserve.common.rpc import channel
from muxserve.v1 import scheduler_pb2, scheduler_pb2_grpc

ASK_TIMEOUT = 1.5


class SchedulerCalls:
    """Channels to schedulers by address, opened on first use and kept."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def units(self, address: str) -> list[scheduler_pb2.UnitStatus]:
        """Of the units that the scheduler runs. Raises the ServiceError that it meant."""
        if address not in self._channels:
            self._channels[address] = channel(address)
        stub: scheduler_pb2_grpc.SchedulerServiceAsyncStub = scheduler_pb2_grpc.SchedulerServiceStub(
            self._channels[address]
        )
        try:
            answer = await stub.GetUnits(scheduler_pb2.GetUnitsRequest(), timeout=ASK_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return list(answer.units)

    async def close(self) -> None:
        """Close all channels; running calls are cancelled."""
        for each in self._channels.values():
            await each.close()
        self._channels.clear()
