"""A scheduler that does what a test tells it: it speaks Attach over real gRPC and pulls from the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.asyncio import Redis

from muxserve.common.queue import Delivery, RequestQueue
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc

SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name
UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED
Event = scheduler_pb2.RequestEvent


class SchedulerPeer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Serves one gateway."""

    def __init__(self, redis: Redis, scheduler_id: str = "scheduler-0") -> None:
        self.id = scheduler_id
        self.queue = RequestQueue(redis)
        self.inbox: asyncio.Queue[scheduler_pb2.AttachRequest] = asyncio.Queue()
        """What the gateway said after its hello."""
        self.attached = asyncio.Event()
        self.gateway_id = ""
        self._registry = Registry(redis)
        self._outbox: asyncio.Queue[scheduler_pb2.AttachResponse | None] = asyncio.Queue()
        self._server: RpcServer | None = None
        self._address = "127.0.0.1:0"
        self._keep: Any = None

    async def start(self) -> None:
        """Listen and register. After a kill: on the same address."""
        self.attached.clear()
        self._outbox = asyncio.Queue()
        self._server = RpcServer(self._address)
        self._server.add(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, self, SERVICE)
        self._address = await self._server.start()
        self._keep = self._registry.keep(entry_of_this_process("scheduler", self.id, self._address))
        await self._keep.__aenter__()

    async def kill(self) -> None:
        """Close every stream at once, as a crash would."""
        if self._server is not None:
            await self._keep.__aexit__(None, None, None)
            await self._server.stop(0)
            self._server = None
            self.attached.clear()

    def break_stream(self) -> None:
        """End the gateway's stream; it may attach again."""
        self.attached.clear()
        self._outbox.put_nowait(None)

    async def Attach(
        self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.AttachResponse]:
        hello = await anext(request_iterator)
        self.gateway_id = hello.hello.gateway_id
        self._outbox = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            yield scheduler_pb2.AttachResponse()
            self.attached.set()
            while (response := await self._outbox.get()) is not None:
                yield response
        finally:
            reader.cancel()

    async def GetUnits(self, request: Any, context: Any) -> scheduler_pb2.GetUnitsResponse:
        return scheduler_pb2.GetUnitsResponse(scheduler_id=self.id)

    async def _read(self, messages: AsyncIterator[scheduler_pb2.AttachRequest]) -> None:
        async for message in messages:
            self.inbox.put_nowait(message)

    async def pull(self, model: str) -> Delivery:
        """The next request of `model`; says that it has started."""
        async with asyncio.timeout(10):
            while True:
                if found := await self.queue.pull({model: 1}, self.id, 200):
                    request_id = found[0].request.request_id
                    self.send(Event(request_id=request_id, attempt=1, started=Event.Started()))
                    return found[0]

    async def message(self) -> scheduler_pb2.AttachRequest:
        """The next thing that the gateway says."""
        async with asyncio.timeout(10):
            return await self.inbox.get()

    def send(self, *events: scheduler_pb2.RequestEvent) -> None:
        """Send one batch."""
        self._outbox.put_nowait(scheduler_pb2.AttachResponse(events=events))

    def tokens(
        self,
        delivery: Delivery,
        index: int,
        token_ids: Sequence[int],
        *,
        finish: common_pb2.FinishReason.ValueType = UNFINISHED,
        attempt: int | None = None,
        logprobs: Sequence[common_pb2.Logprobs] = (),
    ) -> None:
        """Send one batch with tokens of one request."""
        tokens = Event.Tokens(index=index, token_ids=token_ids, finish_reason=finish, logprobs=logprobs)
        attempt = delivery.attempt if attempt is None else attempt
        self.send(Event(request_id=delivery.request.request_id, attempt=attempt, tokens=tokens))
