"""Reads the `google.rpc` error details that a failed call carries in its `grpc-status-details-bin` trailer.

The message classes are built here, in a descriptor pool of their own, so that the SDK needs neither
grpcio-status nor googleapis-common-protos and does not clash with them where they are installed. Only what
MuxServe sends is declared; field numbers are those of google/rpc/status.proto and
google/rpc/error_details.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

TRAILER = "grpc-status-details-bin"

_PACKAGE = "muxserve.client.rpc"
_Field = descriptor_pb2.FieldDescriptorProto
# message -> field -> (number, type, repeated). A type that is not a protobuf scalar names a message of this
# table. Maps are written as the repeated entries that they are on the wire.
_SCHEMA: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Any": {"type_url": (1, "string", False), "value": (2, "bytes", False)},
    "Duration": {"seconds": (1, "int64", False), "nanos": (2, "int32", False)},
    "Entry": {"key": (1, "string", False), "value": (2, "string", False)},
    "FieldViolation": {"field": (1, "string", False), "description": (2, "string", False)},
    "Status": {"code": (1, "int32", False), "message": (2, "string", False), "details": (3, "Any", True)},
    "BadRequest": {"field_violations": (1, "FieldViolation", True)},
    "RetryInfo": {"retry_delay": (1, "Duration", False)},
    "ErrorInfo": {
        "reason": (1, "string", False),
        "domain": (2, "string", False),
        "metadata": (3, "Entry", True),
    },
}
_SCALARS = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
}


def _build() -> Mapping[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="muxserve/client/rpc.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, repeated) in fields.items():
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            entry = message.field.add(name=field_name, number=number, label=label)
            if kind in _SCALARS:
                entry.type = _SCALARS[kind]
            else:
                entry.type = _Field.TYPE_MESSAGE
                entry.type_name = f".{_PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _SCHEMA
    }


_CLASSES = _build()


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing that is wrong with a request."""

    field: str
    """Path of the field, for example `sampling.top_p`."""
    description: str
    """What is wrong with it, for people."""


@dataclass(frozen=True, slots=True)
class Details:
    """What the details of a status say; everything is empty where there are none."""

    violations: tuple[FieldViolation, ...] = ()
    """Of google.rpc.BadRequest."""
    retry_after: float | None = None
    """Seconds, of google.rpc.RetryInfo."""
    reason: str = ""
    """Of google.rpc.ErrorInfo: a constant in UPPER_SNAKE_CASE."""
    domain: str = ""
    """Of google.rpc.ErrorInfo: "muxserve" where it is ours."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of google.rpc.ErrorInfo."""


def parse(trailer: bytes) -> Details:
    """The details in a serialized google.rpc.Status. Unknown details are skipped; bytes that are none give
    none."""
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    reason = domain = ""
    metadata: dict[str, str] = {}
    try:
        for packed in _CLASSES["Status"].FromString(trailer).details:
            name = packed.type_url.rpartition("google.rpc.")[2]
            if name == "BadRequest":
                bad = _CLASSES[name].FromString(packed.value)
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            elif name == "RetryInfo":
                delay = _CLASSES[name].FromString(packed.value).retry_delay
                retry_after = max(0.0, delay.seconds + delay.nanos / 1e9)
            elif name == "ErrorInfo":
                info = _CLASSES[name].FromString(packed.value)
                reason, domain = info.reason, info.domain
                metadata = {entry.key: entry.value for entry in info.metadata}
    except DecodeError:
        return Details()  # a proxy's own idea of the trailer must not hide the status itself
    return Details(tuple(violations), retry_after, reason, domain, metadata)
