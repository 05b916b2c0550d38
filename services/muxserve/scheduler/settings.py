"""What the scheduler needs to know."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from muxserve.common.settings import ServiceSettings
from muxserve.scheduler.policy.interface import PolicyOptions


class SchedulerSettings(ServiceSettings):
    """The scheduler service: it runs the units of the placement, each under a lease."""

    id: str = Field("scheduler-0", min_length=1, max_length=128)
    policy: Literal["adbs", "fcfs"] = "adbs"
    """Who decides what a unit does next."""
    chunk_tokens: int = Field(512, ge=1, le=65_536)
    """Most prompt tokens of a prefill job."""
    chunk_seconds: float = Field(0.5, gt=0)
    """Seconds that a prefill job should take at most."""
    lease_steps: int = Field(8, ge=1, le=1024)
    """Most steps of a decode job."""
    prefill_share: float = Field(0.5, gt=0, le=1)
    """Compute share of a prefill job beside decode jobs."""
    decode_share: float = Field(0.5, gt=0, le=1)
    """Compute share of decode jobs beside a prefill job."""
    adapt_seconds: float = Field(5.0, gt=0)
    """Seconds between adaptations of block quotas."""
    min_share: float = Field(0.2, ge=0, le=1)
    """Least quota of a model, as a part of an equal share of the arena."""

    def policy_options(self) -> PolicyOptions:
        """The policy's part of these settings."""
        return PolicyOptions(
            chunk_tokens=self.chunk_tokens,
            chunk_seconds=self.chunk_seconds,
            lease_steps=self.lease_steps,
            prefill_share=self.prefill_share,
            decode_share=self.decode_share,
            adapt_seconds=self.adapt_seconds,
            min_share=self.min_share,
        )
