"""The MuxServe SDK. It needs grpcio and protobuf, and nothing else.

    from muxserve.client import Client

    with Client("127.0.0.1:8600") as client:
        print(client.generate("a", "The capital of France is", max_tokens=24, temperature=0).text)

`Client` and `AsyncClient` talk to the gateway, `AdminClient` and `AsyncAdminClient` to the placement
service. The errors are drawn in `muxserve.client.errors`.
"""

from .admin import AdminClient, AsyncAdminClient
from .aio import AsyncClient, AsyncCompletionStream
from .details import FieldViolation
from .errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    MuxServeError,
    NotFound,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
)
from .migrations import (
    DrainEvent,
    Migration,
    MigrationEvent,
    MigrationPhase,
    ModelTraffic,
    Move,
    Plan,
)
from .options import Arguments, ClientOptions, Sampling
from .results import (
    Chunk,
    Completion,
    FinishReason,
    Logprobs,
    Message,
    Model,
    ModelState,
    TokenLogprob,
    Usage,
)
from .status import (
    Executor,
    ModelConfig,
    ModelShape,
    ModelStatus,
    PlacedModel,
    Placement,
    Pool,
    QuotaRevision,
    Quotas,
    QuotaState,
    QuotaUse,
    Service,
    Status,
    Unit,
    UnitStatus,
    Worker,
)
from .sync import Client, CompletionStream

__all__ = [
    "AdminClient",
    "Arguments",
    "AsyncAdminClient",
    "AsyncClient",
    "AsyncCompletionStream",
    "Cancelled",
    "Chunk",
    "Client",
    "ClientOptions",
    "Completion",
    "CompletionStream",
    "Conflict",
    "DeadlineExceeded",
    "DrainEvent",
    "Executor",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "InternalError",
    "InvalidRequest",
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
    "MuxServeError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PlacedModel",
    "Placement",
    "Plan",
    "Pool",
    "QuotaRevision",
    "QuotaState",
    "QuotaUse",
    "Quotas",
    "RequestTooLarge",
    "Sampling",
    "Service",
    "Status",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "Unit",
    "UnitStatus",
    "Usage",
    "Worker",
]
