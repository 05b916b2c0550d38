"""What a worker is told at start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from muxserve.common.settings import Bytes, ServiceSettings
from muxserve.engine.memory import available_memory
from muxserve.engine.shares import cuda_index, detect
from muxserve.worker.weight_memory import WeightCacheOptions


def _user_cache() -> Path | None:
    """As the XDG Base Directory Specification has it; None for a user without a home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    # Relative ones are to be ignored, says the specification.
    return base / "muxserve" / "weights" if base.is_absolute() else None


class WorkerSettings(ServiceSettings):
    """A worker: one mesh, its arena and executors."""

    device: str = "cpu"
    """What computes: cpu, or a GPU: cuda, or cuda:N for the one with that number."""
    partition: Literal["auto", "threads", "none", "green_contexts", "mps"] = "auto"
    """How compute shares are made. threads: on cpu. On a GPU green_contexts, which auto takes where there are
    such; none: time slices; mps: NVIDIA's Multi-Process Service, with a daemon of this worker's."""
    mps_prefill: float = Field(50, gt=0, le=100)
    """Percentage of a GPU's multiprocessors that prefill jobs may use under MPS, whatever else runs."""
    mps_decode: float = Field(50, gt=0, le=100)
    """The same for decode jobs; both together may be more than 100."""
    arena: Bytes = Field(512 * 2**20, validate_default=True)
    """Size of the arena of KV blocks."""
    block_bytes: Bytes = Field(16 * 2**10, validate_default=True)
    """Size of a block: a multiple of 64."""
    cores: int | None = Field(None, ge=1)
    """Cores to compute with, or beside a GPU to load weights with. Absent: all that this process may use."""
    decode_lanes: int | None = Field(None, ge=1, le=64)
    """Decode jobs of different models that run side by side, each on its part of the cores. Absent: two,
    where there are two cores. For cpu only: a GPU runs one."""
    slots: int = Field(64, ge=1, le=4096)
    """Sequences of one model that can be open at once."""
    weight_budget: Bytes | None = None
    """Bytes that weights may take in all. Absent: 90% of what is available beside the arena."""
    weight_host_budget: ByteSize | None = Field(None, ge=0)
    """Bytes of weights that are kept in host memory when their models are unloaded, so that they come back
    without a file being read. Absent: on a GPU a quarter of what is available at the start; on cpu 0, since
    there host memory is what weights are loaded into, and to keep them is not to unload them."""
    weight_cache: Path | None = Field(default_factory=_user_cache)
    """Directory in which weights made from GGUF files are kept, so that they are dequantised once. Absent:
    muxserve/weights in the user's cache directory. Workers may share it."""
    weight_cache_limit: ByteSize = Field(ByteSize(32 * 2**30), ge=0)
    """Bytes that it may take; what was not used for longest makes room. 0: nothing is kept."""
    prefix_cache: bool = True
    """Whether spans of prompts that were computed before are found again and not computed twice. They take
    memory that no sequence holds, and make room at once for what needs it."""
    prefix_outputs: bool = False
    """Whether outputs are kept too, for a prompt that goes on where one ended. Prefill adds up attention in
    another order than decode, so that what follows a kept output may differ in its last bits from what
    computing it again would have given, and after that, where two tokens are nearly as likely, in a token."""
    load_timeout: float = Field(1800.0, gt=0)
    """Seconds after which loading a model is given up."""
    executor_timeout: float = Field(120.0, gt=0)
    """Seconds within which an executor must be ready; one that is not is killed and started again."""

    longest_wait: float = Field(0.2, ge=0, le=10, allow_inf_nan=False)
    """Seconds that a token may wait, when many sequences decode together, to share a message with those of
    later steps; 0: none ever waits. `muxserve.worker.pacing` has the rule."""

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if device != "cpu":
            cuda_index(device)
        return device

    @model_validator(mode="after")
    def _suits(self) -> WorkerSettings:
        if self.device == "cpu":
            detect("cpu", wanted=self.partition)
        elif self.partition == "threads":
            raise ValueError("partition: threads are for cpu")
        return self

    @model_validator(mode="after")
    def _sizes(self) -> WorkerSettings:
        if self.block_bytes % 64:
            raise ValueError(f"block_bytes: {self.block_bytes} is not a multiple of 64")
        if self.arena < self.block_bytes:
            raise ValueError(f"arena: {self.arena} bytes hold no block of {self.block_bytes}")
        return self

    @property
    def kept_weights(self) -> WeightCacheOptions | None:
        """Where weights are kept, if they are."""
        if self.weight_cache is None or not self.weight_cache_limit:
            return None
        return WeightCacheOptions(self.weight_cache.expanduser().absolute(), int(self.weight_cache_limit))

    @property
    def host_budget(self) -> int:
        """`weight_host_budget`, resolved."""
        if self.weight_host_budget is not None:
            return int(self.weight_host_budget)
        return 0 if self.device == "cpu" else available_memory() // 4

    @property
    def threads(self) -> int:
        """`cores`, resolved."""
        return self.cores or len(os.sched_getaffinity(0))
