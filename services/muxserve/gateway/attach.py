"""The gateway's streams to the schedulers: one to each in the registry, reopened as soon as it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

import grpc
import structlog

from muxserve.common.errors import Unavailable
from muxserve.common.registry import Registry
from muxserve.common.rpc import channel
from muxserve.v1 import admin_pb2, scheduler_pb2, scheduler_pb2_grpc

log = structlog.get_logger(__name__)

FIRST_POLL, POLL = 0.2, 1.0
"""Seconds between looks at the registry, while no scheduler listens and afterwards."""
HELLO_TIMEOUT = 2.0
"""Seconds that a scheduler may take to answer a hello."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 1.0
"""Seconds between attempts to attach."""
OUTBOX = 100_000
"""Messages kept for a scheduler that is away. Losing one is harmless: it is said again when the scheduler
tells of a request that the gateway does not wait for."""


class Listener(Protocol):
    """Who is told what schedulers say; `RequestTable`."""

    def begin(self, scheduler_id: str) -> None:
        """A new stream of that scheduler begins."""

    def receive(
        self, new: scheduler_pb2.NewTokens, scheduler_id: str
    ) -> Iterable[scheduler_pb2.AttachRequest]:
        """New tokens of many requests; returns the answers."""

    def handle(
        self, event: scheduler_pb2.RequestEvent, scheduler_id: str
    ) -> scheduler_pb2.AttachRequest | None:
        """Something happened to a request; returns the answer, if there is one."""


class SchedulerLink:
    """The stream to one scheduler."""

    def __init__(
        self, entry: admin_pb2.ServiceEntry, gateway_id: str, listener: Listener, changed: Callable[[], None]
    ) -> None:
        self.address = entry.address
        self.attached = False
        """Whether the scheduler has answered the hello of an open stream."""
        self._was_attached = False
        self._id = entry.id
        self._hello = scheduler_pb2.AttachRequest(
            hello=scheduler_pb2.AttachRequest.Hello(gateway_id=gateway_id)
        )
        self._listener = listener
        self._changed = changed
        self._outbox: asyncio.Queue[scheduler_pb2.AttachRequest] = asyncio.Queue(OUTBOX)
        self._task = asyncio.create_task(self._run(), name=f"attach {entry.id}")

    def send(self, message: scheduler_pb2.AttachRequest) -> None:
        """Send `message` as soon as the stream is open."""
        with suppress(asyncio.QueueFull):
            self._outbox.put_nowait(message)

    async def close(self) -> None:
        """End the stream after what was sent is on its way."""
        if self.attached:
            with suppress(TimeoutError):
                async with asyncio.timeout(HELLO_TIMEOUT):
                    await self._outbox.join()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        async with channel(self.address) as connection:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            backoff = FIRST_BACKOFF
            while True:
                try:
                    await self._session(stub.Attach())
                except grpc.aio.AioRpcError as error:
                    self._detached(error.code().name)
                except TimeoutError:
                    self._detached("no answer")
                except Exception:
                    log.exception("the stream to a scheduler failed", scheduler=self._id)
                    self._detached("failed here")
                else:
                    self._detached("ended by the scheduler")
                backoff = FIRST_BACKOFF if self._was_attached else min(2 * backoff, LAST_BACKOFF)
                self._was_attached = False
                await asyncio.sleep(backoff)

    async def _session(self, call: Any) -> None:
        """Serve one stream until it ends."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                await call.write(self._hello)
                response = await call.read()
            if response is grpc.aio.EOF:
                return
            self.attached = self._was_attached = True
            self._listener.begin(self._id)
            log.info("attached", scheduler=self._id, address=self.address)
            self._changed()
            writer = asyncio.create_task(self._write(call), name=f"attach {self._id} writer")
            try:
                while response is not grpc.aio.EOF:
                    self._hear(response)
                    response = await call.read()
            finally:
                writer.cancel()
        finally:
            call.cancel()

    def _hear(self, response: scheduler_pb2.AttachResponse) -> None:
        for event in response.events:
            answer = self._listener.handle(event, self._id)
            if answer is not None:
                self.send(answer)
        if response.HasField("new_tokens"):
            for reply in self._listener.receive(response.new_tokens, self._id):
                self.send(reply)

    async def _write(self, call: Any) -> None:
        """Write what is sent. Ends with the stream."""
        while True:
            message = await self._outbox.get()
            try:
                await call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return
            finally:
                self._outbox.task_done()

    def _detached(self, reason: str) -> None:
        if self.attached:
            log.info("detached", scheduler=self._id, address=self.address, reason=reason)
            self.attached = False
            self._changed()


class SchedulerLinks:
    """Streams to all schedulers."""

    def __init__(
        self, registry: Registry, gateway_id: str, listener: Listener, changed: Callable[[], None]
    ) -> None:
        """`changed` is called when a scheduler comes or goes."""
        self._registry = registry
        self._gateway_id = gateway_id
        self._listener = listener
        self._changed = changed
        self._links: dict[str, SchedulerLink] = {}

    @property
    def attached(self) -> bool:
        """Whether any scheduler listens."""
        return any(link.attached for link in self._links.values())

    def send(self, scheduler_id: str, message: scheduler_pb2.AttachRequest) -> None:
        """Send to a scheduler; nothing happens if it is unknown."""
        if (link := self._links.get(scheduler_id)) is not None:
            link.send(message)

    async def run(self) -> None:
        """Follow the registry. Never returns."""
        while True:
            # While Redis is away the schedulers stay who they are.
            with suppress(Unavailable):
                await self._follow({e.id: e for e in await self._registry.list("scheduler")})
            await asyncio.sleep(POLL if self.attached else FIRST_POLL)

    async def close(self) -> None:
        """End all streams."""
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))

    async def _follow(self, entries: dict[str, admin_pb2.ServiceEntry]) -> None:
        for scheduler_id, link in list(self._links.items()):
            entry = entries.get(scheduler_id)
            moved = entry is not None and entry.address != link.address
            # A stream that is open proves more than an entry that is missing.
            if moved or (entry is None and not link.attached):
                del self._links[scheduler_id]
                await link.close()
        for scheduler_id, entry in entries.items():
            if scheduler_id not in self._links:
                self._links[scheduler_id] = SchedulerLink(
                    entry, self._gateway_id, self._listener, self._changed
                )
