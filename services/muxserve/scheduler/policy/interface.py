"""What a policy sees, what it decides, what it hears back.

A policy is a pure object: no gRPC, Redis, clock or randomness of its own. The scheduler and the simulator
drive the same objects: they build a `Snapshot` of one unit, call `decide`, carry the decisions out in
order, and call `observe` for what came of them.

Counts: a sequence of n tokens of a model whose block holds T of them needs ceil(n / T) block groups of
`blocks_per_span` blocks each. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence whose known tokens are not all computed yet: new, partly computed, or to be recomputed."""

    sequence: int
    arrival: float
    """When its request was accepted; a recomputed sequence keeps it, and so its place in the order."""
    tokens: int
    """Known tokens: the prompt, and the output so far of one that is recomputed."""
    computed: int = 0
    """Tokens whose KV is in the arena: where its next chunk starts."""
    groups: int = 0
    """Block groups it holds."""
    open: bool = False
    """Whether it has a slot at the worker."""
    in_job: bool = False
    """Whether a chunk of it runs."""
    priority: int = 0
    """Higher goes first."""


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence whose known tokens are all computed but the last, so that it can decode."""

    sequence: int
    arrival: float
    length: int
    """Known tokens, the last one sampled included."""
    limit: int
    """Length at which it finishes; always above `length`."""
    groups: int
    """Block groups it holds."""
    in_job: bool = False
    """Whether it is in a decode job."""
    decoded: bool = False
    """Whether it has been in one since its prefill."""
    renew: bool = False
    """Whether its job ends soon, so that it may be given to the one that is to follow. `length` is then what
    it will be at that end."""


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A model of the unit."""

    model: str
    tokens_per_block: int
    blocks_per_span: int
    """Blocks of a block group: layers times KV heads."""
    slots_free: int
    """Sequences that can be opened now."""
    quota: int | None
    """Blocks it may hold without borrowing. None: it has no quota yet."""
    waiting: tuple[Waiting, ...] = ()
    running: tuple[Running, ...] = ()
    held: int = 0
    """Blocks held by the sequences above."""
    closing: int = 0
    """Blocks of sequences that are closed already and come back when a running job ends."""
    pinned_quota: int = 0
    """A quota that configuration fixes. 0: none."""
    rate: float = 0.0
    """Expected arrivals, requests per second. 0: unknown."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The arena's blocks."""

    total: int
    available: int
    """Held by no sequence."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that was started and has not ended."""

    job: int
    kind: Literal["prefill", "decode"]
    model: str
    ending: bool = False
    """Whether its lease was ended already."""
    ends_soon: bool = False
    """Whether it is a decode job near its end: the one that is to follow may be started, and runs when this
    one has ended."""
    last_step: bool = False
    """Whether it will end with the step that runs."""
    fresh: bool = False
    """Whether it is a decode job whose turn it is and that no step was heard of: ended now, it may have done
    nothing."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A unit at one moment."""

    models: tuple[ModelSnapshot, ...]
    """By name."""
    pool: Pool
    jobs: tuple[RunningJob, ...] = ()
    cores: int = 1
    """Compute units of the device."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a waiting sequence."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """Start a prefill job with a compute share in (0, 1] beside decode jobs; alone it has all of the
    device."""

    model: str
    chunks: tuple[Chunk, ...]
    share: float


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Start a decode job of up to `steps` steps with a compute share in (0, 1] beside a prefill job; alone it
    has all of the device."""

    model: str
    sequences: tuple[int, ...]
    steps: int
    share: float


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take blocks and slot of a sequence away; it waits and is recomputed. If it is in a running job, its
    lease is ended and the blocks come back then: they are `closing` until it has."""

    sequence: int


@dataclass(frozen=True, slots=True)
class EndLease:
    """End a decode job after the step that runs."""

    job: int


@dataclass(frozen=True, slots=True)
class AdaptQuotas:
    """Put these block quotas in force, by model."""

    quotas: Mapping[str, int]


Decision = PrefillJob | DecodeJob | Preempt | EndLease | AdaptQuotas


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job ended as asked."""

    kind: Literal["prefill", "decode"]
    model: str
    tokens: int
    """Prompt tokens computed, or tokens decoded."""
    seconds: float
    """Execution time in the executor."""


class Policy(Protocol):
    """Decides what a unit does next. One object per unit: it may remember what it saw."""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """What to do now, in order. Called whenever something ended, arrived or was freed; cheap."""

    def observe(self, event: JobEnded) -> None:
        """Learn from what happened."""


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What operators may tune."""

    chunk_tokens: int = 512
    """Most prompt tokens of a prefill job."""
    chunk_seconds: float = 0.5
    """Aim for prefill jobs no longer than this: a cancelled prompt holds its blocks until its chunk ends."""
    lease_steps: int = 8
    """Most steps of a decode job."""
    decode_jobs: int = 2
    """Decode jobs started at once: one runs, others (of other models) are next in the executor's queue."""
    prefill_share: float = 0.5
    """Compute share of a prefill job beside decode jobs."""
    decode_share: float = 0.5
    """Compute share of decode jobs beside a prefill job."""
    adapt_seconds: float = 5.0
    """Time between adaptations of quotas."""
    min_share: float = 0.2
    """Least quota of a model, as a part of an equal share of the arena."""
