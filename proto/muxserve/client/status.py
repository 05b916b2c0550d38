"""What the admin calls return: values, with no protobuf in them.

Every class is a plain dataclass, so `dataclasses.asdict(status)` is ready for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .migrations import Migration
from .results import ModelState


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How a model is to be served."""

    name: str
    path: str
    """Checkpoint: a Hugging Face directory or a GGUF file, as gateway and workers see it."""
    dtype: str
    """"auto", "float32" or "bfloat16"."""
    quota_blocks: int
    """Blocks that the model may hold without borrowing. 0: a share computed by the scheduler."""
    rate: float
    """Expected arrivals, requests per second. 0: unknown."""
    max_context: int
    """Tokens. 0: the checkpoint's own."""
    pinned: bool = False
    """Whether its weights stay loaded; see `Placement.pinned`."""
    priority: int = 0
    """Where room is needed, idle models of lower priority are put to sleep first."""
    keep_alive: float = 0.0
    """Seconds without a request after which it may be put to sleep though nobody needs the room. 0: never."""
    min_resident: int = 0
    """Replicas that stay loaded."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model is, as read from its checkpoint by a worker."""

    architecture: str
    dtype: str
    context_length: int
    """Tokens, prompt and output together."""
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    tokens_per_block: int
    blocks_per_span: int
    """Blocks of a block group: layers times KV heads."""
    slots: int
    """Sequences that can be open at once on the worker."""


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A model's place."""

    config: ModelConfig
    state: ModelState
    reason: str
    """Why it FAILED, else empty."""
    field: str
    """The field at fault where it FAILED for bad input."""
    shape: ModelShape | None
    """None until a worker has read the checkpoint."""
    loads: int = 0
    """How often its weights were loaded here."""
    load_seconds: float = 0.0
    """That loading them took the last time. 0: they were not loaded yet."""
    expected_wait: float = 0.0
    """Where it is ASLEEP: seconds that a request is likely to wait for it, from `room_at` on. Infinite: what
    is pinned leaves no room for it."""
    room_at: float = 0.0
    """Where it is ASLEEP: Unix time when there will be room for it. 0: there is."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A mesh and the models on it."""

    name: str
    worker_id: str
    worker_address: str
    worker_incarnation: str
    models: tuple[PlacedModel, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """The versioned placement document."""

    epoch: int
    """Grows with each change. 0: nothing is placed yet."""
    units: tuple[Unit, ...]
    unplaced: tuple[PlacedModel, ...]
    """Models that could not be placed."""
    migration: Migration | None = None
    """Under way."""
    planned: tuple[Migration, ...] = ()
    """To follow it."""
    ended: tuple[Migration, ...] = ()
    """The latest that have ended, newest first."""
    drained_workers: tuple[str, ...] = ()
    """Workers that are to have no models."""
    pinned: Mapping[str, bool] = field(default_factory=dict)
    """What was said with `pin` and `unpin`, by model name. Others are pinned as their configuration says."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model in a unit: what the scheduler and the worker say of it, side by side."""

    model: str
    unit: str
    state: ModelState
    running: int
    """Requests with KV on the device."""
    waiting: int
    """Requests pulled from the queue that do not run yet, or again."""
    held_blocks: int
    quota_blocks: int
    borrowed_blocks: int
    """Held above the quota."""
    peak_blocks: int
    """Most it ever held."""
    preemptions: int
    generated_tokens: int
    prefill_tokens: int
    """Prompt tokens computed; those that the prefix cache had are not among them."""
    cached_blocks: int
    """Held by no sequence but caching its prefixes."""
    prefix_query_tokens: int
    """Tokens of the prompts for which the prefix cache was asked, since the model was loaded."""
    prefix_hit_tokens: int
    """How many of them it had."""


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """A unit, as its scheduler and worker see it."""

    unit: str
    connected: bool
    """Whether the scheduler's job stream to the worker is open."""
    policy: str
    models: tuple[ModelStatus, ...]
    prefill_jobs: int
    decode_jobs: int


@dataclass(frozen=True, slots=True)
class Pool:
    """The books of a worker's block pool."""

    block_bytes: int
    total_blocks: int
    free_blocks: int
    """Held by no sequence and caching nothing."""
    cached_blocks: int
    """Held by no sequence but caching a prefix: free memory for any model."""
    integrity_error: str
    """Empty: the books add up."""


@dataclass(frozen=True, slots=True)
class Executor:
    """An executor process."""

    kind: str
    """"prefill" or "decode"."""
    pid: int
    """0 while it restarts."""
    restarts: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A mesh."""

    worker_id: str
    incarnation: str
    device: str
    """"cpu", or the GPU's name."""
    compute_units: int
    """Cores, or streaming multiprocessors."""
    partition: str
    """How compute shares are made."""
    pool: Pool
    executors: tuple[Executor, ...]
    weight_budget_bytes: int
    """0: no limit of its own."""


@dataclass(frozen=True, slots=True)
class Service:
    """A live process."""

    kind: str
    """"gateway", "scheduler", "worker" or "placement"."""
    id: str
    address: str
    incarnation: str
    pid: int


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at a glance."""

    placement: Placement
    units: tuple[UnitStatus, ...]
    workers: tuple[Worker, ...]
    services: tuple[Service, ...]

    @property
    def models(self) -> tuple[ModelStatus, ...]:
        """The models of all units."""
        return tuple(model for unit in self.units for model in unit.models)


class QuotaState(StrEnum):
    """What became of a revision of quotas."""

    UNKNOWN = "unknown"
    """A state that this SDK does not know."""
    PENDING = "pending"
    """It was asked for; the worker does not have it yet."""
    APPLIED = "applied"
    """It is, or was, in force, and no model held more than it gives."""
    DEFERRED = "deferred"
    """It is in force, but some model has held more than it gives ever since."""
    STALE = "stale"
    """A newer revision came before it was applied."""


@dataclass(frozen=True, slots=True)
class QuotaRevision:
    """A change of a unit's quotas, and what became of it."""

    revision: int
    author: str
    """"admin" or "policy"."""
    blocks: Mapping[str, int]
    """What was asked for, by model name."""
    asked: float
    """When, in seconds of Unix time."""
    state: QuotaState
    above: tuple[str, ...]
    """Where it is DEFERRED: the models that hold more than it gives."""


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """What a model has of the pool."""

    quota: int
    held: int
    borrowed: int
    """Held above the quota."""
    cached: int
    """Held by no sequence but caching its prefixes."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """Block quotas of a unit."""

    unit: str
    revision: int
    """Grows with each change."""
    blocks: Mapping[str, int]
    """Blocks by model name."""
    history: tuple[QuotaRevision, ...] = ()
    """The latest revisions, newest first. Not told by `set_quota`."""
    use: Mapping[str, QuotaUse] = field(default_factory=dict)
    """By model name; empty while the worker does not answer. Not told by `set_quota`."""

    @property
    def state(self) -> QuotaState:
        """What became of this revision."""
        return next(
            (each.state for each in self.history if each.revision == self.revision), QuotaState.PENDING
        )
