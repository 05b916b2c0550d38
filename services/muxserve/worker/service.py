"""`WorkerServicer`: the RPCs, each handed on to the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from muxserve.common.errors import InvalidArgument, Unavailable
from muxserve.v1 import worker_pb2, worker_pb2_grpc
from muxserve.worker import convert
from muxserve.worker.orders import Ended, Nearing, QuotasInForce
from muxserve.worker.pacing import Progress
from muxserve.worker.session import Event, Session
from muxserve.worker.worker import Worker

SERVICE = "muxserve.v1.WorkerService"

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService; worker.proto says what each RPC means."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def _ready(self) -> Worker:
        """Raises Unavailable while the worker starts: one that was killed is called at its address again
        before it knows what its weights may take."""
        if not self._worker.ready:
            raise Unavailable("the worker is starting", retry_after=0.5)
        return self._worker

    async def GetInfo(
        self, request: worker_pb2.GetInfoRequest, context: Context
    ) -> worker_pb2.GetInfoResponse:
        return worker_pb2.GetInfoResponse(info=convert.worker_info(self._ready()))

    async def InspectModel(
        self, request: worker_pb2.InspectModelRequest, context: Context
    ) -> worker_pb2.InspectModelResponse:
        served = await self._ready().models.inspect(convert.choice(request.model))
        return worker_pb2.InspectModelResponse(shape=convert.shape(served))

    async def LoadModel(
        self, request: worker_pb2.LoadModelRequest, context: Context
    ) -> worker_pb2.LoadModelResponse:
        before = self._ready().models.get(request.model.name)
        self._worker.fence.admit(request.epoch)
        model = await self._worker.models.load(convert.choice(request.model))
        seconds = 0.0 if model is before else model.load_seconds
        return worker_pb2.LoadModelResponse(shape=convert.shape(model.shape), load_seconds=seconds)

    async def UnloadModel(
        self, request: worker_pb2.UnloadModelRequest, context: Context
    ) -> worker_pb2.UnloadModelResponse:
        worker = self._ready()
        worker.fence.admit(request.epoch)
        await worker.models.unload(request.model)
        return worker_pb2.UnloadModelResponse()

    async def AnnounceEpoch(
        self, request: worker_pb2.AnnounceEpochRequest, context: Context
    ) -> worker_pb2.AnnounceEpochResponse:
        fence = self._ready().fence
        fence.hear(request.epoch)
        return worker_pb2.AnnounceEpochResponse(epoch=fence.epoch)

    async def Jobs(
        self, request_iterator: AsyncIterator[worker_pb2.JobsRequest], context: Context
    ) -> AsyncIterator[worker_pb2.JobsResponse]:
        first = await anext(aiter(request_iterator), worker_pb2.JobsRequest())
        if not first.HasField("hello"):
            raise InvalidArgument("hello", "the first message has to be a hello")
        session = await self._ready().sessions.open(first.hello.scheduler_id, first.hello.epoch)
        reader = asyncio.create_task(_read(request_iterator, session), name="jobs-reader")
        try:
            yield worker_pb2.JobsResponse(info=convert.worker_info(self._worker))
            while (event := await session.next_event()) is not None:
                yield self._response(event)
            if reader.done():
                reader.result()
        finally:
            reader.cancel()
            await self._worker.sessions.close(session)

    def _response(self, event: Event) -> worker_pb2.JobsResponse:
        match event:
            case Progress():
                return worker_pb2.JobsResponse(step=convert.step_events(event))
            case Ended():
                return worker_pb2.JobsResponse(done=convert.job_done(event))
            case Nearing():
                return worker_pb2.JobsResponse(nearing=worker_pb2.JobNearing(job=event.job))
            case QuotasInForce():
                return worker_pb2.JobsResponse(quotas=convert.quotas_in_force(event))
            case _:
                return worker_pb2.JobsResponse(info=convert.worker_info(self._worker))


async def _read(requests: AsyncIterator[worker_pb2.JobsRequest], session: Session) -> None:
    """Hand the scheduler's messages to the session until there are no more."""
    try:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "open":
                    session.open(convert.opening(request.open))
                case "prefill":
                    session.prefill(convert.prefill_order(request.prefill))
                case "decode":
                    session.decode(convert.decode_order(request.decode))
                case "end_lease":
                    session.end_lease(request.end_lease.job)
                case "close":
                    session.close_sequences(request.close.sequences)
                case "quotas":
                    session.set_quotas(request.quotas.revision, request.quotas.blocks)
                case other:
                    raise InvalidArgument(other or "kind", "not expected in the middle of a stream")
    finally:
        session.finish()
