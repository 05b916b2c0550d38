"""What a worker is told at start."""

from __future__ import annotations

import os

from pydantic import Field, model_validator

from muxserve.common.settings import Bytes, ServiceSettings


class WorkerSettings(ServiceSettings):
    """A worker: one mesh, its arena and executors."""

    arena: Bytes = Field(512 * 2**20, validate_default=True)
    """Size of the arena of KV blocks."""
    block_bytes: Bytes = Field(16 * 2**10, validate_default=True)
    """Size of a block: a multiple of 64."""
    cores: int | None = Field(None, ge=1)
    """Cores to compute with. Absent: all that this process may use."""
    slots: int = Field(64, ge=1, le=4096)
    """Sequences of one model that can be open at once."""
    weight_budget: Bytes | None = None
    """Bytes that weights may take in all. Absent: 90% of what is available once the arena is full."""
    load_timeout: float = Field(1800.0, gt=0)
    """Seconds after which loading a model is given up."""
    executor_timeout: float = Field(120.0, gt=0)
    """Seconds within which an executor must be ready; one that is not is killed and started again."""

    @model_validator(mode="after")
    def _sizes(self) -> WorkerSettings:
        if self.block_bytes % 64:
            raise ValueError(f"block_bytes: {self.block_bytes} is not a multiple of 64")
        if self.arena < self.block_bytes:
            raise ValueError(f"arena: {self.arena} bytes hold no block of {self.block_bytes}")
        return self

    @property
    def compute_units(self) -> int:
        """Cores to compute with, resolved."""
        return self.cores or len(os.sched_getaffinity(0))
