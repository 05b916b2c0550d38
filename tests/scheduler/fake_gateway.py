"""A gateway without clients: it queues requests, attaches to a scheduler and follows the rules for events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from muxserve.common.queue import RequestQueue
from muxserve.common.rpc import channel
from muxserve.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc

SAMPLING = common_pb2.SamplingParams(temperature=0.0, top_p=1.0, seed=0, repetition_penalty=1.0)


@dataclass
class Client:
    """What a request's client has got."""

    request: scheduler_pb2.QueuedRequest
    entry_id: str = ""
    attempt: int = 1
    tokens: list[int] = field(default_factory=list)
    logprobs: int = 0
    finish: int = 0
    failed: scheduler_pb2.RequestEvent.Failed | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def on_event(self, event: scheduler_pb2.RequestEvent) -> None:
        if event.attempt < self.attempt:
            return
        self.attempt = event.attempt
        self.started.set()
        match event.WhichOneof("kind"):
            case "tokens":
                new = event.tokens
                assert new.index <= len(self.tokens), "a gap"
                fresh = new.token_ids[len(self.tokens) - new.index :]
                assert (
                    list(new.token_ids[: len(new.token_ids) - len(fresh)])
                    == self.tokens[new.index : new.index + len(new.token_ids) - len(fresh)]
                ), "what was sent before is what is sent again"
                self.tokens += fresh
                self.logprobs += len(new.logprobs)
                self.finish = new.finish_reason
                self.progress.set()
                if self.finish:
                    self.done.set()
            case "failed":
                self.failed = event.failed
                self.done.set()

    async def reach(self, tokens: int) -> None:
        """Wait until it has that many tokens, or is done."""
        while len(self.tokens) < tokens and not self.done.is_set():
            self.progress.clear()
            await self.progress.wait()


class FakeGateway:
    def __init__(self, queue: RequestQueue, name: str = "gateway-x") -> None:
        self.queue, self.name = queue, name
        self.clients: dict[str, Client] = {}
        self.attached = asyncio.Event()
        self.numbers: dict[int, scheduler_pb2.RequestEvent] = {}
        """The event that said which request and attempt a number of the stream stands for."""
        self.mute = False
        """Do not answer resume queries."""
        self._task: asyncio.Task[None] | None = None
        self._call: Any = None
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._numbers = 0

    async def attach(self, address: str) -> None:
        """Attach and stay attached."""
        self._task = asyncio.create_task(self._run(address))
        await self.attached.wait()

    async def detach(self) -> None:
        """Break the stream and do not come back."""
        self.attached.clear()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def break_stream(self) -> None:
        self.attached.clear()
        self._call.cancel()

    async def ask(
        self,
        model: str,
        prompt: Sequence[int],
        max_tokens: int,
        stop: Sequence[int] = (),
        deadline: float = 0.0,
        logprobs: int | None = None,
    ) -> Client:
        """Queue a request. `deadline` in seconds from now."""
        self._numbers += 1
        now = int(time.time() * 1000)
        request = scheduler_pb2.QueuedRequest(
            request_id=f"{self.name}-{self._numbers}",
            model=model,
            gateway_id=self.name,
            prompt_tokens=prompt,
            sampling=SAMPLING,
            max_tokens=max_tokens,
            stop_token_ids=stop,
            deadline_unix_ms=now + int(deadline * 1000) if deadline else 0,
            accepted_unix_ms=now,
            logprobs=logprobs,
        )
        client = self.clients[request.request_id] = Client(request)
        client.entry_id = await self.queue.admit(request, 1000)
        return client

    async def cancel(self, client: Client) -> None:
        del self.clients[client.request.request_id]
        await self._cancel(client.request.request_id)

    async def cancel_number(self, number: int) -> None:
        cancel = scheduler_pb2.AttachRequest.Cancel(number=number)
        await self._write(scheduler_pb2.AttachRequest(cancel=cancel))

    async def _cancel(self, request_id: str) -> None:
        cancel = scheduler_pb2.AttachRequest.Cancel(request_id=request_id)
        await self._write(scheduler_pb2.AttachRequest(cancel=cancel))

    async def _write(self, message: scheduler_pb2.AttachRequest) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _run(self, address: str) -> None:
        async with channel(address) as connection:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(connection)
            while True:
                self._call = call = stub.Attach()
                try:
                    hello = scheduler_pb2.AttachRequest.Hello(gateway_id=self.name)
                    await call.write(scheduler_pb2.AttachRequest(hello=hello))
                    self.numbers.clear()
                    while (response := await call.read()) is not grpc.aio.EOF:
                        self.attached.set()
                        for event in response.events:
                            await self._on_event(event)
                        await self._on_tokens(response.new_tokens)
                except grpc.aio.AioRpcError:
                    pass
                except asyncio.CancelledError:
                    # Also what a reader of a stream that was broken on purpose gets.
                    if (task := asyncio.current_task()) is None or task.cancelling():
                        raise
                await asyncio.sleep(0.05)

    async def _on_tokens(self, new: scheduler_pb2.NewTokens) -> None:
        rest = list(new.token_ids)
        for number, index, count in zip(new.numbers, new.indexes, new.counts, strict=True):
            told, here, rest = self.numbers[number], rest[:count], rest[count:]
            tokens = scheduler_pb2.RequestEvent.Tokens(index=index, token_ids=here)
            await self._on_event(
                scheduler_pb2.RequestEvent(request_id=told.request_id, attempt=told.attempt, tokens=tokens)
            )

    async def _on_event(self, event: scheduler_pb2.RequestEvent) -> None:
        if event.number:
            self.numbers[event.number] = event
        client = self.clients.get(event.request_id)
        if event.WhichOneof("kind") == "resume_query":
            if self.mute:
                return
            answer = scheduler_pb2.AttachRequest.Resume(
                request_id=event.request_id, attempt=event.attempt, gone=client is None
            )
            if client is not None:
                client.attempt = event.attempt
                answer.emitted_tokens.extend(client.tokens)
            await self._write(scheduler_pb2.AttachRequest(resume=answer))
        elif client is None:
            await self._cancel(event.request_id)
        else:
            client.on_event(event)
