"""The public surface: locked, the same for both kinds of client, and complete."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from muxserve import client as sdk
from muxserve.client.options import ARGUMENT_FIELDS, SAMPLING_FIELDS
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2
from tests.client.peer import Server

ADMIN = {
    "cancel",
    "close",
    "drain",
    "load",
    "pin",
    "placement",
    "plan",
    "quotas",
    "rebalance",
    "set_quota",
    "status",
    "undrain",
    "unload",
    "unpin",
}
SURFACE = {
    "AdminClient": ADMIN,
    "AsyncAdminClient": ADMIN,
    "AsyncClient": {"chat", "chat_stream", "close", "generate", "model", "models", "stream"},
    "AsyncCompletionStream": {"close", "request_id", "result"},
    "Client": {"chat", "chat_stream", "close", "generate", "model", "models", "stream"},
    "CompletionStream": {"close", "request_id", "result"},
}
VALUES = {
    "Arguments",
    "Chunk",
    "ClientOptions",
    "Completion",
    "DrainEvent",
    "Executor",
    "FieldViolation",
    "FinishReason",
    "Logprobs",
    "Message",
    "Migration",
    "MigrationEvent",
    "MigrationPhase",
    "Model",
    "ModelConfig",
    "ModelShape",
    "ModelState",
    "ModelStatus",
    "ModelTraffic",
    "Move",
    "PlacedModel",
    "Placement",
    "Plan",
    "Pool",
    "QuotaRevision",
    "QuotaState",
    "QuotaUse",
    "Quotas",
    "Sampling",
    "Service",
    "Status",
    "TokenLogprob",
    "Unit",
    "UnitStatus",
    "Usage",
    "Worker",
}
ERRORS = {
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "FailedPrecondition",
    "InternalError",
    "InvalidRequest",
    "MuxServeError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "RequestTooLarge",
    "Unauthenticated",
    "Unavailable",
}


def test_exports_change_only_on_purpose() -> None:
    assert set(sdk.__all__) == SURFACE.keys() | VALUES | ERRORS
    assert list(sdk.__all__) == sorted(sdk.__all__)


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_methods_change_only_on_purpose(name: str) -> None:
    assert {member for member in vars(getattr(sdk, name)) if not member.startswith("_")} == SURFACE[name]


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (sdk.Client, sdk.AsyncClient),
        (sdk.AdminClient, sdk.AsyncAdminClient),
        (sdk.CompletionStream, sdk.AsyncCompletionStream),
    ],
)
def test_both_kinds_of_client_take_the_same_arguments(blocking: type, asynchronous: type) -> None:
    for name in SURFACE[blocking.__name__] - {"request_id", "result"}:
        theirs = inspect.signature(getattr(asynchronous, name)).parameters
        assert inspect.signature(getattr(blocking, name)).parameters == theirs, name


def test_every_error_has_one_root() -> None:
    assert all(issubclass(getattr(sdk, name), sdk.MuxServeError) for name in ERRORS)
    assert all(name in (sdk.errors.__doc__ or "") for name in ERRORS)


def test_every_rpc_can_be_reached(connect: Callable[..., Any], server: Server) -> None:
    client, admin = connect(server.address), connect(server.address, admin=True)
    client.generate("a", "Hi")
    client.models()
    client.model("a")
    admin.status()
    admin.placement()
    admin.quotas()
    admin.set_quota("a", 1)
    admin.plan()
    list(admin.rebalance([sdk.Move("a", "worker-1")]))
    list(admin.load("a", "worker-1"))
    list(admin.unload("a"))
    admin.pin("a")
    list(admin.drain("worker-0"))
    admin.cancel()
    services = [
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    ]
    assert server.peer.calls == {method.name for service in services for method in service.methods}


def test_every_field_of_a_request_has_an_argument() -> None:
    request = {field.name for field in inference_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert request - {"model", "prompt", "prompt_tokens", "chat"} <= ARGUMENT_FIELDS
    assert {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields} == set(SAMPLING_FIELDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 0),
        ("timeout", float("nan")),
        ("max_retries", -1),
        ("keepalive", -1),
        ("max_message_bytes", 0),
    ],
)
def test_a_bad_option_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        sdk.ClientOptions(**{field: value})  # type: ignore[arg-type]
