"""The asyncio client: the same surface as the blocking one. Not to be shared between event loops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio

from muxserve.v1 import inference_pb2, inference_pb2_grpc

from .errors import Cancelled, MuxServeError, from_rpc
from .inference import (
    Assembly,
    check_size,
    completion_request,
    largest_field,
    model_of,
    new_request_id,
)
from .options import Arguments, ClientOptions, channel_options, with_timeout
from .results import Chunk, Completion, Message, Model
from .retry import Attempts

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def _being_cancelled() -> bool:
    """Whether a CancelledError is meant for the task, rather than being gRPC's word for a cancelled call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncTransport:
    """A channel and the rules for calls over it."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self.options = options
        self._target = target
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """Made when it is first needed, because it belongs to the event loop that runs then."""
        if self._channel is None:
            arguments = channel_options(self._target, self.options)
            self._channel = (
                grpc.aio.secure_channel(self._target, self.options.credentials, arguments)
                if self.options.credentials
                else grpc.aio.insecure_channel(self._target, arguments)
            )
        return self._channel

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
        *,
        retry: bool = True,
    ) -> _Response:
        """One answer to one message. Raises the errors of `errors`."""
        attempts = Attempts(self.options, timeout, time.monotonic(), retry=retry)
        while True:
            try:
                left = attempts.remaining(time.monotonic())
                return await method(request, timeout=left, metadata=self.options.metadata)
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(error)
                delay = attempts.next_delay(failure, time.monotonic())
                if delay is None:
                    raise failure from error
                await asyncio.sleep(delay)
                await self.wait_connected(attempts, failure)
            except asyncio.CancelledError:
                if not _being_cancelled():  # but the call is, with its channel
                    raise Cancelled("the client was closed", code=grpc.StatusCode.CANCELLED) from None
                raise

    def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> AsyncIterator[_Response]:
        """Answers to one message as they come; never retried. The call is on its way at once, and is
        cancelled where its answers are no longer read. Iterating raises the errors of `errors`."""
        attempts = Attempts(self.options, timeout, time.monotonic(), retry=False)
        call = method(request, timeout=attempts.remaining(time.monotonic()), metadata=self.options.metadata)
        return _read(call)

    async def wait_connected(self, attempts: Attempts, failure: MuxServeError) -> None:
        """Wait until the server can be reached again; `failure` if it cannot."""
        try:
            async with asyncio.timeout(attempts.connect_timeout(time.monotonic())):
                await self.channel.channel_ready()
        except TimeoutError:
            raise failure from failure.__cause__

    async def close(self) -> None:
        """Close the channel if there is one."""
        if self._channel is not None:
            await self._channel.close()


async def _read(call: grpc.aio.UnaryStreamCall[_Request, _Response]) -> AsyncIterator[_Response]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error
    except asyncio.CancelledError:
        if not _being_cancelled():  # but the call is, with its channel
            raise Cancelled("the client was closed", code=grpc.StatusCode.CANCELLED) from None
        raise
    finally:
        call.cancel()


class AsyncCompletionStream(AsyncIterator[Chunk]):
    """The pieces of one answer as they appear.

    The call is on its way as soon as the stream exists. It is cancelled, and the work for it stops, when the
    stream is closed, when an `async with` block around it ends, when the task that reads it is cancelled, or
    when the last reference to it is gone: leaving `async for chunk in client.stream(...)` early is enough.
    Iterating raises the errors of `errors`.
    """

    def __init__(
        self, transport: AsyncTransport, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> None:
        self._call: (
            grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse] | None
        ) = None
        check_size(request, transport.options.max_message_bytes)
        self._transport = transport
        self._request = request
        self._fresh_id = not request.request_id
        self._stub = inference_pb2_grpc.InferenceServiceStub(transport.channel)
        self._attempts = Attempts(transport.options, timeout, time.monotonic())
        self._assembly = Assembly(request.model, request.request_id)
        self._closed = asyncio.Event()
        self._result: Completion | MuxServeError | None = None
        self._begin()

    def _begin(self) -> None:
        if self._fresh_id:
            self._request.request_id = self._assembly.request_id = new_request_id()
        self._call = self._stub.Generate(
            self._request,
            timeout=self._attempts.remaining(time.monotonic()),
            metadata=self._transport.options.metadata,
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._result is not None:
            raise StopAsyncIteration
        try:
            chunk = await self._next()
            if chunk is None:
                self._result = self._assembly.completion()
                raise StopAsyncIteration
        except MuxServeError as failure:
            self._result = failure
            self._cancel()
            raise
        return chunk

    async def _next(self) -> Chunk | None:
        """The next piece, or None at the end; begins the call anew where that is allowed."""
        while True:
            if self._closed.is_set():
                raise self._cancelled()
            assert self._call is not None
            try:
                message = await self._call.read()
                if not isinstance(message, inference_pb2.GenerateResponse):  # it is grpc.aio.EOF
                    return None
                return self._assembly.add(message)
            except asyncio.CancelledError:
                if not _being_cancelled():  # but the call is, by close() or with its channel
                    raise self._cancelled() from None
                self._cancel()
                raise
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(
                    error,
                    request_id=self._assembly.request_id,
                    largest_field=largest_field(self._request),
                )
                await self._retry(failure, error)

    async def _retry(self, failure: MuxServeError, error: grpc.RpcError) -> None:
        """Begin the call anew, or raise `failure`."""
        delay = None
        if not self._assembly.begun and not self._closed.is_set():
            delay = self._attempts.next_delay(failure, time.monotonic())
        if delay is None:
            raise failure from error
        failure.__cause__ = error
        try:
            async with asyncio.timeout(delay):
                await self._closed.wait()
        except TimeoutError:
            await self._transport.wait_connected(self._attempts, failure)
            self._begin()

    def _cancelled(self) -> Cancelled:
        return Cancelled(
            "the stream was closed", code=grpc.StatusCode.CANCELLED, request_id=self._assembly.request_id
        )

    def _cancel(self) -> None:
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    @property
    def request_id(self) -> str:
        """Id of the request, to be found in the service's logs."""
        return self._assembly.request_id

    @property
    def result(self) -> Completion:
        """The whole answer, once the stream has been read to its end. Raises what the stream raised, or
        RuntimeError where it has not ended."""
        if self._result is None:
            raise RuntimeError("the stream has not been read to its end")
        if isinstance(self._result, MuxServeError):
            raise self._result
        return self._result

    async def close(self) -> None:
        """Cancel the call unless it has ended. A reader gets `Cancelled`."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None:
            with suppress(RuntimeError):  # the event loop is closed, and the call with it
                self._cancel()


async def _drain(stream: AsyncCompletionStream) -> Completion:
    async with stream:
        async for _ in stream:
            pass
    return stream.result


class AsyncClient:
    """Generates text with the models of a MuxServe gateway.

        async with AsyncClient("127.0.0.1:8600") as client:
            print((await client.generate("a", "The capital of France is", max_tokens=24, temperature=0)).text)
            async for chunk in client.chat_stream("a", [{"role": "user", "content": "Hello!"}]):
                print(chunk.text, end="", flush=True)

    Keyword arguments of the generating calls are those of `Arguments`. Every call raises the errors of
    `muxserve.client.errors`, and TypeError for a keyword it does not know.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8600",
        *,
        options: ClientOptions | None = None,
        timeout: float | None = None,
    ) -> None:
        """`target`: host:port, or any gRPC target. `timeout`: in place of the one in `options`."""
        self._transport = AsyncTransport(target, with_timeout(options, timeout))

    async def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        prompt_tokens: Sequence[int] | None = None,
        **arguments: Unpack[Arguments],
    ) -> Completion:
        """Continue a text, or token ids; wait for the whole answer."""
        return await _drain(self.stream(model, prompt, prompt_tokens=prompt_tokens, **arguments))

    def stream(
        self,
        model: str,
        prompt: str | None = None,
        *,
        prompt_tokens: Sequence[int] | None = None,
        **arguments: Unpack[Arguments],
    ) -> AsyncCompletionStream:
        """Continue a text, or token ids; get the answer in pieces. To be called in a running event loop."""
        request = completion_request(model, prompt=prompt, prompt_tokens=prompt_tokens, **arguments)
        return AsyncCompletionStream(self._transport, request, arguments.get("timeout"))

    async def chat(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **arguments: Unpack[Arguments]
    ) -> Completion:
        """Answer a conversation, oldest turn first; wait for the whole answer."""
        return await _drain(self.chat_stream(model, messages, **arguments))

    def chat_stream(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **arguments: Unpack[Arguments]
    ) -> AsyncCompletionStream:
        """Answer a conversation, oldest turn first; get the answer in pieces. To be called in a running
        event loop."""
        request = completion_request(model, messages=messages, **arguments)
        return AsyncCompletionStream(self._transport, request, arguments.get("timeout"))

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """All models, by name."""
        stub = inference_pb2_grpc.InferenceServiceStub(self._transport.channel)
        answer = await self._transport.call(stub.ListModels, inference_pb2.ListModelsRequest(), timeout)
        return tuple(map(model_of, answer.models))

    async def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model. NotFound: there is none of that name."""
        stub = inference_pb2_grpc.InferenceServiceStub(self._transport.channel)
        request = inference_pb2.GetModelRequest(name=name)
        return model_of((await self._transport.call(stub.GetModel, request, timeout)).model)

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
