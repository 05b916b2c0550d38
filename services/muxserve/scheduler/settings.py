"""What the scheduler needs to know."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from pydantic import Field

from muxserve.common.settings import ServiceSettings
from muxserve.scheduler.policy.interface import PolicyOptions


class SchedulerSettings(ServiceSettings):
    """The scheduler service: it runs the units of the placement, each under a lease."""

    id: str = Field("scheduler-0", min_length=1, max_length=128)
    policy: Literal["mux", "adbs", "fcfs", "round_robin", "temporal", "spatial"] = "mux"
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
    """Least quota of a model, as a part of an equal share of the arena; least part of the device's time under
    `spatial`."""
    quantum: float = Field(1.0, gt=0)
    """Under `temporal`: seconds that a model has the device for while others want it."""
    turn_seconds: float = Field(0.2, gt=0)
    """Seconds that one turn of all models should take, and a chunk of a prompt."""
    stretch: float = Field(8.0, gt=1)
    """How many times its time alone on the device a request may take, where its model has no targets."""
    chunked: bool = True
    """Switch of `mux`: prompts come in chunks of about `turn_seconds`; off: of `chunk_seconds`."""
    gather: bool = True
    """Switch of `mux`: short prompts share a pass over the weights with what decodes of their model, or with
    others that come soon."""
    borrow: bool = True
    """Switch of `mux`: blocks that nobody claims are lent beyond quotas; off: quotas are hard."""
    slack: bool = True
    """Switch of `mux`: prompts go by when they are due, and no more sequences decode at once than targets
    allow; off: by round-robin and age."""
    turns: bool = True
    """Switch of `mux`: models decode equally many steps per turn; off: fixed numbers."""
    shares: bool = True
    """Switch of `mux`: prefill jobs get what targets for time per output token leave; off: fixed shares."""
    priorities: bool = True
    """Switch of `mux`: requests of higher priority go first."""
    fairness: bool = True
    """Switch of `mux`: tenants that had more than others wait behind them."""
    admission: bool = True
    """Switch of `mux`: requests that cannot be finished before their deadline are refused."""

    def policy_options(self) -> PolicyOptions:
        """The policy's part of these settings."""
        names = {option.name for option in fields(PolicyOptions)} & set(type(self).model_fields)
        return PolicyOptions(**{name: getattr(self, name) for name in names})
