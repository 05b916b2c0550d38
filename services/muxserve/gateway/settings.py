"""What the gateway needs to know."""

from __future__ import annotations

from pydantic import Field

from muxserve.common.rpc import MAX_MESSAGE_BYTES
from muxserve.common.settings import Bytes, ServiceSettings


class GatewaySettings(ServiceSettings):
    """The gateway: clients' requests in, streams of text out."""

    id: str = Field("gateway-0", min_length=1, max_length=128)
    max_requests: int = Field(4096, ge=1)
    """Requests held at once; more are refused with RESOURCE_EXHAUSTED."""
    max_waiting: int = Field(1024, ge=1)
    """Requests that may wait in a model's queue; more are refused with RESOURCE_EXHAUSTED."""
    default_deadline: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that a request has whose client set no deadline."""
    longest_wait: float = Field(0.1, ge=0, le=10, allow_inf_nan=False)
    """Seconds that tokens may wait, when many requests are in flight, to share a message with later ones; 0:
    none ever waits. `muxserve.gateway.pacing` has the rule."""
    drain: float = Field(3.0, ge=0, allow_inf_nan=False)
    """Seconds that running requests have when the gateway stops; those left over are cancelled."""
    max_message_bytes: Bytes = Field(MAX_MESSAGE_BYTES, validate_default=True)
    """Size of the largest message; a larger one is refused with RESOURCE_EXHAUSTED."""
