"""Statuses become typed errors, with what their details say."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from muxserve import client as sdk
from muxserve.client import InvalidRequest, MuxServeError, details
from muxserve.client.errors import from_rpc, from_status
from tests.client.peer import Peer, Script, answer, refusal

CODES = [
    ("INVALID_ARGUMENT", sdk.InvalidRequest),
    ("OUT_OF_RANGE", sdk.InvalidRequest),
    ("UNAUTHENTICATED", sdk.Unauthenticated),
    ("PERMISSION_DENIED", sdk.PermissionDenied),
    ("NOT_FOUND", sdk.NotFound),
    ("ABORTED", sdk.Conflict),
    ("ALREADY_EXISTS", sdk.Conflict),
    ("FAILED_PRECONDITION", sdk.FailedPrecondition),
    ("RESOURCE_EXHAUSTED", sdk.Overloaded),
    ("UNAVAILABLE", sdk.Unavailable),
    ("DEADLINE_EXCEEDED", sdk.DeadlineExceeded),
    ("CANCELLED", sdk.Cancelled),
    ("INTERNAL", sdk.InternalError),
    ("UNKNOWN", sdk.InternalError),
    ("DATA_LOSS", sdk.InternalError),
    ("UNIMPLEMENTED", sdk.InternalError),
]


def aborting(status: grpc.Status) -> Script:
    """A script that answers with a status."""

    def script(_: object, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(status)

    return script


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_each_status_has_its_class(client: Any, peer: Peer, code: str, kind: type[MuxServeError]) -> None:
    # Beyond any timeout, so that UNAVAILABLE is not tried again.
    peer.script = aborting(refusal(grpc.StatusCode[code], "because", retry_after=90.5))
    with pytest.raises(MuxServeError, match="because") as caught:
        client.generate("a", "Hi")
    error = caught.value
    assert type(error) is kind
    assert error.code is grpc.StatusCode[code]
    assert error.request_id == "req-of-server"
    assert error.retry_after == pytest.approx(90.5)
    assert error.reason == "BECAUSE"
    assert "req-of-server" in str(error)
    assert isinstance(error.__cause__, grpc.RpcError)


def test_a_bad_request_names_its_field(client: Any, peer: Peer) -> None:
    peer.script = aborting(refusal(grpc.StatusCode.INVALID_ARGUMENT, field="sampling.top_p"))
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a", "Hi", top_p=0)
    assert (caught.value.field, caught.value.description) == ("sampling.top_p", "is wrong")


def test_any_error_may_name_a_field(client: Any, peer: Peer) -> None:
    peer.script = aborting(refusal(grpc.StatusCode.NOT_FOUND, field="model"))
    with pytest.raises(sdk.NotFound) as caught:
        client.generate("z", "Hi")
    assert caught.value.field == "model"


def test_a_status_without_details_still_has_the_request_id_that_was_sent(client: Any, peer: Peer) -> None:
    def script(_: object, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.INTERNAL, "oops")

    peer.script = script
    with pytest.raises(sdk.InternalError) as caught:
        client.generate("a", "Hi")
    assert caught.value.request_id == peer.requests[0].request_id
    assert caught.value.retry_after is None


def test_a_failure_of_the_servicer_is_an_internal_error(client: Any, peer: Peer) -> None:
    def script(*_: object) -> Any:
        raise ZeroDivisionError

    peer.script = script
    with pytest.raises(sdk.InternalError):
        client.generate("a", "Hi")


def test_an_error_after_some_text_ends_the_stream_with_that_error(client: Any, peer: Peer) -> None:
    def script(request: Any, context: grpc.ServicerContext) -> Any:
        yield next(iter(answer(["one"], request.request_id)))
        context.abort_with_status(refusal(grpc.StatusCode.UNAVAILABLE, "worker lost"))

    peer.script = script
    stream = client.stream("a", "Hi")
    assert next(stream).text == "one"
    with pytest.raises(sdk.Unavailable, match="worker lost"):
        next(stream)
    with pytest.raises(sdk.Unavailable, match="worker lost"):
        _ = stream.result
    assert len(peer.requests) == 1


def test_the_timeout_is_the_servers_deadline_and_the_clients_error(client: Any, peer: Peer) -> None:
    left: list[float | None] = []

    def script(_: object, context: grpc.ServicerContext) -> Any:
        left.append(context.time_remaining())
        peer.ended.wait(10)
        return iter(())

    peer.script = script
    with pytest.raises(sdk.DeadlineExceeded) as caught:
        client.generate("a", "Hi", timeout=1.5)
    assert caught.value.request_id
    assert left[0] is not None
    assert 0 < left[0] <= 1.5 + 0.1  # the server rounds what it was told


def test_details_that_are_not_a_status_do_not_hide_the_error() -> None:
    error = from_status(grpc.StatusCode.NOT_FOUND, "gone", b"\xff\xff not a status")
    assert type(error) is sdk.NotFound
    assert error.retry_after is None


def test_unknown_details_are_skipped() -> None:
    status = status_pb2.Status(code=3)
    status.details.add().Pack(error_details_pb2.Help())
    status.details.add().Pack(
        error_details_pb2.BadRequest(field_violations=[{"field": "f", "description": "d"}])
    )
    assert details.parse(status.SerializeToString()).violations == (details.FieldViolation("f", "d"),)


def test_an_error_that_is_no_call_is_an_internal_error() -> None:
    assert type(from_rpc(grpc.RpcError("odd"))) is sdk.InternalError
