"""gRPC plumbing that every service shares: a server with errors, health and reflection, and channels."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from muxserve.common.errors import Internal, ServiceError, to_status

log = structlog.get_logger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # To a server too: without it one that has no call open takes a third ping for an attack.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a servicer raises into a status: ServiceError as it says, anything else INTERNAL, logged."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/muxserve."):
            return handler
        method = handler_call_details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            return make(_unary(inner, method), **codec)
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        # A servicer that writes its answers itself saves several awaits for each of them.
        wrap = _unary if inspect.iscoroutinefunction(inner) else _streaming
        return make(wrap(inner, method), **codec)


def _unary(inner: Any, method: str) -> Any:
    """For servicers that are coroutines."""

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(request, context)
        except grpc.aio.BaseError:  # gRPC's own: an aborted call, or a write to one that is gone
            raise
        except Exception as error:
            await _abort(context, error, method)

    return call


def _streaming(inner: Any, method: str) -> Any:
    """For servicers that are asynchronous generators."""

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in inner(request, context):
                yield response
        except grpc.aio.BaseError:
            raise
        except Exception as error:
            await _abort(context, error, method)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    """End the call with the status of what the servicer raised. Called where it is being handled."""
    if not isinstance(error, ServiceError):
        log.exception("rpc failed", method=method)
        error = Internal("internal error; the service's log has it")
    await context.abort_with_status(to_status(error, error.request_id))


class _Health(health.aio.HealthServicer):
    """Whoever watches a service is told of changes until it leaves.

    The library forgets all who watch a service when one of them leaves (grpcio-health-checking 1.81), so that
    the others never hear of a change again.
    """

    _server_watchers: defaultdict[str, asyncio.Condition]

    def __init__(self) -> None:
        super().__init__()
        self._watching: Counter[str] = Counter()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        name = request.service
        condition = self._server_watchers[name]
        self._watching[name] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching[name] -= 1
            if self._watching[name]:
                self._server_watchers[name] = condition
            else:
                del self._watching[name]


class RpcServer:
    """A grpc.aio server that listens on `address` ("host:port", port 0 = any free one).

    Health: "" is liveness and SERVING from start to stop; a service's full name is readiness and NOT_SERVING
    until `set_serving` says otherwise.
    """

    def __init__(
        self, address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES, with_reflection: bool = True
    ) -> None:
        self._address = address
        self._with_reflection = with_reflection
        self._names: list[str] = []
        self._health = _Health()
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[
                *KEEPALIVE,
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )

    def add(
        self, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object, full_name: str
    ) -> None:
        """Serve `servicer` under its protobuf service name, for example "muxserve.v1.WorkerService"."""
        add_to_server(servicer, self._server)
        self._names.append(full_name)

    async def start(self) -> str:
        """Listen; returns "host:port" as bound. Raises OSError if the address is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._with_reflection:
            names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        await self.set_serving("", True)
        for name in self._names:
            await self.set_serving(name, False)
        return f"{self._address.rsplit(':', 1)[0]}:{port}"

    async def set_serving(self, name: str, serving: bool) -> None:
        """Health of service `name`."""
        kind = health_pb2.HealthCheckResponse
        await self._health.set(name, kind.SERVING if serving else kind.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, refuse new calls, give running ones `grace` seconds, cancel the rest."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


def channel(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to another service, which notices a dead peer and reconnects fast."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            *KEEPALIVE,
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.use_local_subchannel_pool", 1),
        ],
    )
