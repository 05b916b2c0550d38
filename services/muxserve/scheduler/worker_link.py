"""`WorkerLink`: keeps the Jobs stream between a unit and its worker open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from muxserve.common.rpc import channel
from muxserve.scheduler.unit import Unit
from muxserve.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

HELLO_TIMEOUT = 30.0
"""Seconds until the worker must have answered a hello: it ends its former scheduler's running job before."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 1.0
"""Seconds between attempts to connect."""


class WorkerLink:
    """The stream, opened again whenever it breaks or the worker has moved."""

    def __init__(self, unit: Unit, scheduler_id: str) -> None:
        self._unit = unit
        self._scheduler_id = scheduler_id
        self._address = ""
        self._call: Any = None

    def move(self, address: str) -> None:
        """The worker is at `address`."""
        if address != self._address:
            self._address = address
            if self._call is not None:
                self._call.cancel()

    async def run(self, epoch: int) -> None:
        """Serve the unit until cancelled, under the lease's `epoch`."""
        hello = worker_pb2.JobsRequest.Hello(scheduler_id=self._scheduler_id, epoch=epoch)
        backoff, before = FIRST_BACKOFF, ""
        while True:
            address, reason = self._address, "the worker ended the stream"
            try:
                async with channel(address) as connection:
                    stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(
                        connection
                    )
                    if await self._session(stub.Jobs(), hello):
                        backoff, before = FIRST_BACKOFF, ""
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except TimeoutError:
                reason = "no answer to hello"
            except asyncio.CancelledError:
                # A call that `move` has cancelled looks like this; a cancelled task has to end.
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                reason = "the worker has moved"
            if reason != before:
                log.warning("not connected to worker", unit=self._unit.name, address=address, reason=reason)
            before = reason
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    async def _session(self, call: Any, hello: worker_pb2.JobsRequest.Hello) -> bool:
        """Serve one stream until it ends. True: the worker has answered."""
        self._call = call
        outbox: asyncio.Queue[worker_pb2.JobsRequest] = asyncio.Queue()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                await call.write(worker_pb2.JobsRequest(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF:
                return False
            log.info(
                "connected to worker", unit=self._unit.name, worker=first.info.worker_id, epoch=hello.epoch
            )
            self._unit.connected(first.info, outbox.put_nowait)
            writer = asyncio.create_task(_write(call, outbox.get), name=f"jobs-writer {self._unit.name}")
            while (response := await call.read()) is not grpc.aio.EOF:
                self._unit.handle(response)
            return True
        finally:
            self._call = None
            self._unit.disconnected()
            if writer is not None:
                writer.cancel()
            call.cancel()


async def _write(call: Any, get: Callable[[], Any]) -> None:
    """Write what the unit sends. Ends with the stream; its reader learns why."""
    try:
        while True:
            await call.write(await get())
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return
