"""`SchedulerServicer`: the RPCs, each handed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from muxserve.common.errors import InvalidArgument
from muxserve.scheduler.gateways import Attachment, GatewayHub
from muxserve.scheduler.scheduler import Scheduler
from muxserve.v1 import scheduler_pb2, scheduler_pb2_grpc

SERVICE = "muxserve.v1.SchedulerService"

Context = grpc.aio.ServicerContext[Any, Any]


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """SchedulerService; scheduler.proto says what each RPC means."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def GetUnits(
        self, request: scheduler_pb2.GetUnitsRequest, context: Context
    ) -> scheduler_pb2.GetUnitsResponse:
        return scheduler_pb2.GetUnitsResponse(units=self._scheduler.status(), scheduler_id=self._scheduler.id)

    async def Attach(
        self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Context
    ) -> AsyncIterator[scheduler_pb2.AttachResponse]:
        first = await anext(aiter(request_iterator), scheduler_pb2.AttachRequest())
        if not first.HasField("hello") or not first.hello.gateway_id:
            raise InvalidArgument("hello", "the first message has to be a hello with a gateway_id")
        attachment = self._scheduler.hub.attach(first.hello.gateway_id)
        reader = asyncio.create_task(
            _read(request_iterator, self._scheduler.hub, attachment), name="attach-reader"
        )
        try:
            yield scheduler_pb2.AttachResponse()
            while (batch := await attachment.next_batch()) is not None:
                yield batch
        finally:
            reader.cancel()
            self._scheduler.hub.detach(attachment)


async def _read(
    requests: AsyncIterator[scheduler_pb2.AttachRequest], hub: GatewayHub, attachment: Attachment
) -> None:
    """Hand the gateway's messages on until there are no more; then the stream is to end."""
    try:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "cancel":
                    hub.cancel(request.cancel)
                case "resume":
                    hub.resume(request.resume)
                case _:
                    return
    finally:
        attachment.close()
