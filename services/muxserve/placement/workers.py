"""Calls to workers, each with a deadline. A failed call raises the ServiceError that the worker meant."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc

from muxserve.common.errors import from_rpc_error
from muxserve.common.rpc import channel
from muxserve.v1 import common_pb2, worker_pb2, worker_pb2_grpc

INFO_TIMEOUT = 2.0
INSPECT_TIMEOUT = 60.0
UNLOAD_TIMEOUT = 30.0

T = TypeVar("T")


class WorkerCalls:
    """Channels to workers by address, opened on first use and kept."""

    def __init__(self, load_timeout: float) -> None:
        self._load_timeout = load_timeout
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def info(self, address: str) -> worker_pb2.WorkerInfo:
        """The worker's state."""
        call = self._stub(address).GetInfo(worker_pb2.GetInfoRequest(), timeout=INFO_TIMEOUT)
        return (await _outcome(call)).info

    async def inspect(self, address: str, model: common_pb2.ModelConfig) -> common_pb2.ModelShape:
        """What it would take to serve `model` there."""
        request = worker_pb2.InspectModelRequest(model=model)
        return (await _outcome(self._stub(address).InspectModel(request, timeout=INSPECT_TIMEOUT))).shape

    async def load(
        self, address: str, model: common_pb2.ModelConfig, epoch: int
    ) -> worker_pb2.LoadModelResponse:
        """Load `model`, as the document of that epoch says; returns when it can be used."""
        request = worker_pb2.LoadModelRequest(model=model, epoch=epoch)
        return await _outcome(self._stub(address).LoadModel(request, timeout=self._load_timeout))

    async def unload(self, address: str, model: str, epoch: int) -> None:
        """Unload `model`, as the document of that epoch says."""
        request = worker_pb2.UnloadModelRequest(model=model, epoch=epoch)
        await _outcome(self._stub(address).UnloadModel(request, timeout=UNLOAD_TIMEOUT))

    async def announce(self, address: str, epoch: int) -> int:
        """Say that there is a document of that epoch; the highest that the worker has heard of."""
        request = worker_pb2.AnnounceEpochRequest(epoch=epoch)
        return (await _outcome(self._stub(address).AnnounceEpoch(request, timeout=INFO_TIMEOUT))).epoch

    async def close(self) -> None:
        """Close all channels; running calls are cancelled."""
        for each in self._channels.values():
            await each.close()
        self._channels.clear()

    def _stub(self, address: str) -> worker_pb2_grpc.WorkerServiceAsyncStub:
        if address not in self._channels:
            self._channels[address] = channel(address)
        return worker_pb2_grpc.WorkerServiceStub(self._channels[address])


async def _outcome(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
