"""What the placement service needs to know."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

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
    drain_seconds: float = Field(5.0, ge=0, allow_inf_nan=False)
    """Seconds that sequences have to finish on a worker that their model leaves; then they go on at another
    one, which computes them again."""
    residency: float = Field(4.0, ge=0, allow_inf_nan=False)
    """Seconds that a model which was loaded stays at least before it is put to sleep for others; half of that
    where it idles."""
    residency_factor: float = Field(10.0, ge=0, allow_inf_nan=False)
    """The same as a multiple of the time that loading it takes: the longer of the two counts."""
    residency_most: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Seconds that the multiple comes to at most."""
    rebalance: Literal["auto", "off"] = "auto"
    """Whether models are moved when traffic makes that worthwhile; off: by hand alone."""
    rebalance_interval: float = Field(3.0, gt=0, allow_inf_nan=False)
    """Seconds between looks at whether it is worthwhile."""
    rebalance_horizon: float = Field(120.0, gt=0, allow_inf_nan=False)
    """Seconds for which traffic is expected to stay as it is: what a move gains in that time has to outweigh
    its cost."""
    rebalance_rest: float = Field(20.0, ge=0, allow_inf_nan=False)
    """Seconds for which a model is left where it is after it was moved; six times as long if it was moved by
    hand, or could not be moved."""

    @field_validator("rebalance", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML takes a bare `off` for false."""
        return "off" if value is False else value
