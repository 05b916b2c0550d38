"""What can go wrong, as one tree:

    MuxServeError
    ├── InvalidRequest          INVALID_ARGUMENT, OUT_OF_RANGE: `field` and `description` say what is wrong
    │   └── RequestTooLarge     the message is larger than the SDK or the server takes
    ├── Unauthenticated         UNAUTHENTICATED: who are you?
    ├── PermissionDenied        PERMISSION_DENIED: known, but not allowed
    ├── NotFound                NOT_FOUND: no such model, unit
    ├── Conflict                ABORTED, ALREADY_EXISTS: somebody else was there first
    ├── FailedPrecondition      FAILED_PRECONDITION: not in this state (say, no chat template)
    ├── Overloaded              RESOURCE_EXHAUSTED: the queue or a budget is full; `retry_after`
    ├── Unavailable             UNAVAILABLE: nobody answers, or the model is loading; `retry_after`
    ├── DeadlineExceeded        DEADLINE_EXCEEDED: the timeout passed
    ├── Cancelled               CANCELLED: by `close()`, or by the server
    └── InternalError           INTERNAL, UNKNOWN, DATA_LOSS, UNIMPLEMENTED: a fault of the service

Bad arguments are caught here or by the server, with the same class and the same field names. Where the
failure came over the wire, `__cause__` is the `grpc.RpcError`.
"""

from __future__ import annotations

from typing import Self

import grpc

from .details import TRAILER, Details, FieldViolation, parse


class MuxServeError(Exception):
    """Base of every error that a call raises."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        request_id: str | None = None,
        details: Details | None = None,
    ) -> None:
        super().__init__(message)
        details = details or Details()
        self.message = message
        """For people."""
        self.code = code
        """gRPC status of the call."""
        self.request_id = details.metadata.get("request_id") or request_id
        """Id of the request, to be found in the service's logs. None: the call has none."""
        self.retry_after = details.retry_after
        """Seconds after which a retry makes sense. None: no statement."""
        self.reason = details.reason
        """Constant that names the cause more closely than the class does. Empty: none given."""
        self.violations = details.violations
        """Everything that is wrong with the request, if that is what is wrong."""

    @property
    def field(self) -> str:
        """Path of the first field at fault, for example `sampling.top_p`. Empty: none, or not said."""
        return self.violations[0].field if self.violations else ""

    @property
    def description(self) -> str:
        """What is wrong with it."""
        return self.violations[0].description if self.violations else self.message

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class InvalidRequest(MuxServeError):
    """A field of the request is missing, malformed or out of range. Nothing was changed."""

    @classmethod
    def of(cls, field: str, description: str, request_id: str | None = None) -> Self:
        """An error that was found before anything was sent."""
        return cls(
            f"{field}: {description}",
            code=grpc.StatusCode.INVALID_ARGUMENT,
            request_id=request_id,
            details=Details(violations=(FieldViolation(field, description),)),
        )


class RequestTooLarge(InvalidRequest):
    """The request's message is larger than the SDK or the server takes; `field` is its largest part, where
    known."""


class Unauthenticated(MuxServeError):
    """The call carries no credentials, or wrong ones."""


class PermissionDenied(MuxServeError):
    """The caller may not do this."""


class NotFound(MuxServeError):
    """There is no such model or unit."""


class Conflict(MuxServeError):
    """The state changed under the caller, for example a quota whose `expected_revision` is not the current
    one."""


class FailedPrecondition(MuxServeError):
    """The call cannot be served in the present state, and trying again does not help."""


class Overloaded(MuxServeError):
    """The service has all it can take. Try again after `retry_after` seconds."""


class Unavailable(MuxServeError):
    """The service, or a part that it needs, cannot be reached now."""


class DeadlineExceeded(MuxServeError):
    """The timeout passed before the call ended. Work on it has stopped."""


class Cancelled(MuxServeError):
    """The call was closed before it ended. Work on it has stopped."""


class InternalError(MuxServeError):
    """The service failed."""


_BY_CODE: dict[grpc.StatusCode, type[MuxServeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_status(
    code: grpc.StatusCode,
    message: str,
    trailer: bytes | None = None,
    *,
    request_id: str | None = None,
    largest_field: str = "",
) -> MuxServeError:
    """The error of a status. `largest_field`: what to blame where gRPC itself found the message too large."""
    details = parse(trailer) if trailer else Details()
    kind = _BY_CODE.get(code, InternalError)
    if kind is Overloaded and not trailer and "message larger than max" in message:
        # gRPC's own limits use the code of a full queue.
        if "CLIENT: Received" in message:
            kind = InternalError
        else:
            kind = RequestTooLarge
            details = Details(violations=(FieldViolation(largest_field, message),))
    text = message or code.name.lower().replace("_", " ")
    return kind(text, code=code, request_id=request_id, details=details)


def from_rpc(
    error: grpc.RpcError, *, request_id: str | None = None, largest_field: str = ""
) -> MuxServeError:
    """The error of a failed call, sync or aio."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return InternalError(str(error), code=grpc.StatusCode.UNKNOWN, request_id=request_id)
    trailer: bytes | None = None
    for key, value in error.trailing_metadata() or ():
        if key == TRAILER and isinstance(value, bytes):
            trailer = value
    return from_status(
        error.code(), error.details() or "", trailer, request_id=request_id, largest_field=largest_field
    )
