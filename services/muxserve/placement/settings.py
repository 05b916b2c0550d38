"""What the placement service needs to know."""

from __future__ import annotations

from pydantic import Field

from muxserve.common.config import Models
from muxserve.common.settings import ServiceSettings


class PlacementSettings(ServiceSettings):
    """The placement service: which models are to be served, and on how many workers."""

    id: str = Field("placement-0", min_length=1, max_length=128)
    models: Models
    """What to serve."""
    workers: int = Field(1, ge=1, le=10_000)
    """Workers to wait for before models are placed, so that the first to come does not get all of them."""
    worker_wait: float = Field(30.0, ge=0)
    """Seconds to wait for them; then models are placed on those that are there."""
    load_timeout: float = Field(900.0, gt=0)
    """Seconds that loading a model may take."""
