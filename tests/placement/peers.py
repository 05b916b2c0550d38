"""The other side of placement: a worker that speaks WorkerService and tells what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from muxserve.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Overloaded
from muxserve.common.registry import Registry, entry_of_this_process
from muxserve.common.rpc import RpcServer
from muxserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from muxserve.worker.fence import Fence

MIB = 2**20
Context = grpc.aio.ServicerContext[Any, Any]


async def eventually(true: Callable[[], Awaitable[bool]], limit: float = 10.0) -> None:
    """Wait until `true()`; fails after `limit` seconds."""
    async with asyncio.timeout(limit):
        while not await true():  # noqa: ASYNC110 (what is waited for is in another process)
            await asyncio.sleep(0.02)


class PeerWorker(worker_pb2_grpc.WorkerServiceServicer):
    """A worker whose checkpoints are numbers: path "100" has 100 MiB of weights; anything else is broken."""

    def __init__(self, worker_id: str, budget_mib: int = 0) -> None:
        self.worker_id = worker_id
        self.budget = budget_mib * MIB
        self.loaded: dict[str, common_pb2.ModelConfig] = {}
        self.loads: list[str] = []
        self.stuck = False
        """Whether nothing is unloaded."""
        self.refuse = False
        """Whether loading fails for good."""
        self.open: dict[str, int] = {}
        """Sequences that are open, by model."""
        self.fence = Fence()
        self.release = asyncio.Event()
        """Cleared: loading does not end."""
        self.release.set()

    def shape(self, model: common_pb2.ModelConfig) -> common_pb2.ModelShape:
        if not model.path.rsplit("/", 1)[-1].isdigit():
            raise InvalidArgument("path", f'"{model.path}" is no checkpoint')
        return common_pb2.ModelShape(
            architecture="llama", context_length=2048, weight_bytes=int(model.path.rsplit("/", 1)[-1]) * MIB
        )

    async def GetInfo(
        self, request: worker_pb2.GetInfoRequest, context: Context
    ) -> worker_pb2.GetInfoResponse:
        info = worker_pb2.WorkerInfo(
            worker_id=self.worker_id,
            weight_budget_bytes=self.budget,
            pool=worker_pb2.PoolState(block_bytes=16384, total_blocks=1000, free_blocks=1000),
            models=[
                worker_pb2.LoadedModel(model=name, open_sequences=self.open.get(name, 0))
                for name in self.loaded
            ],
        )
        return worker_pb2.GetInfoResponse(info=info)

    async def InspectModel(
        self, request: worker_pb2.InspectModelRequest, context: Context
    ) -> worker_pb2.InspectModelResponse:
        return worker_pb2.InspectModelResponse(shape=self.shape(request.model))

    async def LoadModel(
        self, request: worker_pb2.LoadModelRequest, context: Context
    ) -> worker_pb2.LoadModelResponse:
        self.fence.admit(request.epoch)
        model = request.model
        self.loads.append(model.name)
        await self.release.wait()
        if self.loaded.get(model.name, model) != model:
            raise AlreadyExists(f'"{model.name}" is another checkpoint')
        if self.refuse or model.rate == 13:
            raise Overloaded("13 brings bad luck", None)
        self.loaded[model.name] = model
        return worker_pb2.LoadModelResponse(shape=self.shape(model), load_seconds=0.05)

    async def UnloadModel(
        self, request: worker_pb2.UnloadModelRequest, context: Context
    ) -> worker_pb2.UnloadModelResponse:
        self.fence.admit(request.epoch)
        if self.stuck or self.open.get(request.model):
            raise FailedPrecondition(f"{request.model} has open sequences")
        self.loaded.pop(request.model, None)
        return worker_pb2.UnloadModelResponse()

    async def AnnounceEpoch(
        self, request: worker_pb2.AnnounceEpochRequest, context: Context
    ) -> worker_pb2.AnnounceEpochResponse:
        self.fence.hear(request.epoch)
        return worker_pb2.AnnounceEpochResponse(epoch=self.fence.epoch)

    @asynccontextmanager
    async def serve(self, registry: Registry, bind: str = "127.0.0.1:0") -> AsyncIterator[str]:
        """Serve as a process with a new incarnation; yields the address."""
        server = RpcServer(bind)
        server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, self, "muxserve.v1.WorkerService")
        address = await server.start()
        try:
            async with registry.keep(entry_of_this_process("worker", self.worker_id, address)):
                yield address
        finally:
            await server.stop(0)
