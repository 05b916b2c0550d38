"""The errors that services raise, and their one mapping to gRPC status with google.rpc details.

    ServiceError
    ├── InvalidArgument      INVALID_ARGUMENT     BadRequest names the field
    ├── Unauthenticated      UNAUTHENTICATED
    ├── PermissionDenied     PERMISSION_DENIED
    ├── NotFound             NOT_FOUND            ResourceInfo; BadRequest names the field
    ├── AlreadyExists        ALREADY_EXISTS
    ├── FailedPrecondition   FAILED_PRECONDITION
    ├── Aborted              ABORTED
    ├── Overloaded           RESOURCE_EXHAUSTED   RetryInfo if a retry makes sense
    ├── Unavailable          UNAVAILABLE          RetryInfo
    ├── DeadlineExceeded     DEADLINE_EXCEEDED
    ├── Cancelled            CANCELLED
    └── Internal             INTERNAL

Every status also carries ErrorInfo (domain "muxserve", reason = the class in upper snake case, metadata
"request_id" where there is one).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "muxserve"


class ServiceError(Exception):
    """Base of all; `str(error)` is the message that a client sees."""

    code = grpc.StatusCode.UNKNOWN
    retry_after: float | None = None
    """Seconds after which a retry makes sense, where that is known."""
    request_id = ""
    """The request that it ended, where there is one; set by whoever knows."""

    def details(self) -> Iterator[message.Message]:
        """google.rpc detail messages beyond ErrorInfo."""
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromTimedelta(timedelta(seconds=self.retry_after))
            yield error_details_pb2.RetryInfo(retry_delay=delay)


class InvalidArgument(ServiceError):
    """A field of the request is bad. `field` is its path in the message, for example "sampling.top_p"."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def details(self) -> Iterator[message.Message]:
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.reason)
        yield error_details_pb2.BadRequest(field_violations=[violation])


class Unauthenticated(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServiceError):
    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(ServiceError):
    """`what` ("model", "unit") named `name` does not exist. The field at fault bears the same word."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, what: str, name: str, hint: str = "") -> None:
        super().__init__(f'no {what} named "{name}"' + (f"; {hint}" if hint else ""))
        self.what = what
        self.name = name

    def details(self) -> Iterator[message.Message]:
        yield error_details_pb2.ResourceInfo(resource_type=self.what, resource_name=self.name)
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.what, description=str(self))
        yield error_details_pb2.BadRequest(field_violations=[violation])


class AlreadyExists(ServiceError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ServiceError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(ServiceError):
    code = grpc.StatusCode.ABORTED


class Overloaded(ServiceError):
    """There is no room. `retry_after` in seconds; None: waiting does not help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, reason: str, retry_after: float | None = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Unavailable(ServiceError):
    """Something that is needed is away for now. `retry_after` in seconds."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, reason: str, retry_after: float | None = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ServiceError):
    code = grpc.StatusCode.CANCELLED


class Internal(ServiceError):
    code = grpc.StatusCode.INTERNAL


_SIMPLE: dict[grpc.StatusCode, type[ServiceError]] = {
    kind.code: kind
    for kind in (
        Unauthenticated,
        PermissionDenied,
        AlreadyExists,
        FailedPrecondition,
        Aborted,
        DeadlineExceeded,
        Cancelled,
    )
}


def to_status(error: ServiceError, request_id: str = "") -> grpc.Status:
    """The gRPC status of `error`, for `context.abort_with_status`."""
    reason = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    if request_id:
        info.metadata["request_id"] = request_id
    status = status_pb2.Status(code=error.code.value[0], message=str(error))
    for detail in (info, *error.details()):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def from_rpc_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """The error that the peer raised. Statuses that are not one of ours become Unavailable or Internal."""
    code, text = error.code(), error.details() or error.code().name
    field, retry_after, resource = _parse_details(error)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidArgument(field or "request", text.removeprefix(f"{field}: "))
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(*(resource or ("resource", text)))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(text, retry_after)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(text, retry_after if retry_after is not None else 1.0)
    return _SIMPLE.get(code, Internal)(text)


def _parse_details(error: grpc.aio.AioRpcError) -> tuple[str, float | None, tuple[str, str] | None]:
    """(field, retry_after, (resource type, name)) from the status details; empty where absent."""
    field, retry_after, resource = "", None, None
    raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if not isinstance(raw, bytes):
        return field, retry_after, resource
    for detail in status_pb2.Status.FromString(raw).details:
        bad, retry, info = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.ResourceInfo(),
        )
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(info):
            resource = (info.resource_type, info.resource_name)
    return field, retry_after, resource
