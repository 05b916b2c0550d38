"""The blocking client. Safe to share between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from muxserve.v1 import inference_pb2, inference_pb2_grpc

from .errors import MuxServeError, from_rpc
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


class Transport:
    """A channel and the rules for calls over it."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        self.options = options
        arguments = channel_options(target, options)
        self.channel = (
            grpc.secure_channel(target, options.credentials, arguments)
            if options.credentials
            else grpc.insecure_channel(target, arguments)
        )

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
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
                return method(request, timeout=left, metadata=self.options.metadata)
            except grpc.RpcError as error:
                failure = from_rpc(error)
                delay = attempts.next_delay(failure, time.monotonic())
                if delay is None:
                    raise failure from error
                time.sleep(delay)
                self.wait_connected(attempts, failure)

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> Iterator[_Response]:
        """Answers to one message as they come; never retried. The call is on its way at once, and is
        cancelled where its answers are no longer read. Iterating raises the errors of `errors`."""
        attempts = Attempts(self.options, timeout, time.monotonic(), retry=False)
        call = method(request, timeout=attempts.remaining(time.monotonic()), metadata=self.options.metadata)
        return _read(call)

    def wait_connected(self, attempts: Attempts, failure: MuxServeError) -> None:
        """Wait until the server can be reached again; `failure` if it cannot.

        Any answer to a health check will do. (`grpc.channel_ready_future` would leave a thread behind that
        fails with a traceback if the channel is closed within the next 200 ms.)
        """
        probe: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check"
        )
        try:
            probe(b"", timeout=attempts.connect_timeout(time.monotonic()), wait_for_ready=True)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise failure from failure.__cause__


def _read(call: grpc._CallIterator[_Response]) -> Iterator[_Response]:
    try:
        yield from call
    except grpc.RpcError as error:
        raise from_rpc(error) from error
    finally:
        call.cancel()


class CompletionStream(Iterator[Chunk]):
    """The pieces of one answer as they appear.

    The call is on its way as soon as the stream exists. It is cancelled, and the work for it stops, when the
    stream is closed, when a `with` block around it ends, or when the last reference to it is gone: leaving
    `for chunk in client.stream(...)` early is enough. Iterating raises the errors of `errors`.
    """

    def __init__(
        self, transport: Transport, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> None:
        self._call: grpc._CallIterator[inference_pb2.GenerateResponse] | None = None
        check_size(request, transport.options.max_message_bytes)
        self._transport = transport
        self._request = request
        self._fresh_id = not request.request_id
        self._stub = inference_pb2_grpc.InferenceServiceStub(transport.channel)
        self._attempts = Attempts(transport.options, timeout, time.monotonic())
        self._assembly = Assembly(request.model, request.request_id)
        self._closed = threading.Event()
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
        if self._closed.is_set():
            self._call.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._result is not None:
            raise StopIteration
        try:
            chunk = self._next()
            if chunk is None:
                self._result = self._assembly.completion()
                raise StopIteration
        except MuxServeError as failure:
            self._result = failure
            self.close()
            raise
        return chunk

    def _next(self) -> Chunk | None:
        """The next piece, or None at the end; begins the call anew where that is allowed."""
        while True:
            assert self._call is not None
            try:
                message = next(self._call, None)
                return None if message is None else self._assembly.add(message)
            except grpc.RpcError as error:
                failure = from_rpc(
                    error,
                    request_id=self._assembly.request_id,
                    largest_field=largest_field(self._request),
                )
                self._retry(failure, error)

    def _retry(self, failure: MuxServeError, error: grpc.RpcError) -> None:
        """Begin the call anew, or raise `failure`."""
        delay = None
        if not self._assembly.begun and not self._closed.is_set():
            delay = self._attempts.next_delay(failure, time.monotonic())
        if delay is None or self._closed.wait(delay):
            raise failure from error
        failure.__cause__ = error
        self._transport.wait_connected(self._attempts, failure)
        self._begin()

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

    def close(self) -> None:
        """Cancel the call unless it has ended. Any thread may do this; a reader gets `Cancelled`."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None:
            self.close()


def _drain(stream: CompletionStream) -> Completion:
    with stream:
        for _ in stream:
            pass
    return stream.result


class Client:
    """Generates text with the models of a MuxServe gateway.

        with Client("127.0.0.1:8600") as client:
            print(client.generate("a", "The capital of France is", max_tokens=24, temperature=0).text)
            for chunk in client.chat_stream("a", [{"role": "user", "content": "Hello!"}]):
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
        self._transport = Transport(target, with_timeout(options, timeout))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._transport.channel)

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        prompt_tokens: Sequence[int] | None = None,
        **arguments: Unpack[Arguments],
    ) -> Completion:
        """Continue a text, or token ids; wait for the whole answer."""
        return _drain(self.stream(model, prompt, prompt_tokens=prompt_tokens, **arguments))

    def stream(
        self,
        model: str,
        prompt: str | None = None,
        *,
        prompt_tokens: Sequence[int] | None = None,
        **arguments: Unpack[Arguments],
    ) -> CompletionStream:
        """Continue a text, or token ids; get the answer in pieces."""
        request = completion_request(model, prompt=prompt, prompt_tokens=prompt_tokens, **arguments)
        return CompletionStream(self._transport, request, arguments.get("timeout"))

    def chat(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **arguments: Unpack[Arguments]
    ) -> Completion:
        """Answer a conversation, oldest turn first; wait for the whole answer."""
        return _drain(self.chat_stream(model, messages, **arguments))

    def chat_stream(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **arguments: Unpack[Arguments]
    ) -> CompletionStream:
        """Answer a conversation, oldest turn first; get the answer in pieces."""
        request = completion_request(model, messages=messages, **arguments)
        return CompletionStream(self._transport, request, arguments.get("timeout"))

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """All models, by name."""
        request = inference_pb2.ListModelsRequest()
        answer = self._transport.call(self._stub.ListModels, request, timeout)
        return tuple(map(model_of, answer.models))

    def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model. NotFound: there is none of that name."""
        request = inference_pb2.GetModelRequest(name=name)
        return model_of(self._transport.call(self._stub.GetModel, request, timeout).model)

    def close(self) -> None:
        """Close the connection; calls that are under way are cancelled."""
        self._transport.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
