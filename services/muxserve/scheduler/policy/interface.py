"""What a policy sees, what it decides, what it hears back.

A policy is a pure object: no gRPC, Redis, clock or randomness of its own. The scheduler and the simulator
drive the same objects: they build a `Snapshot` of one unit, call `decide`, carry the decisions out in
order, and call `observe` for what came of them.

Counts: a sequence of n tokens of a model whose block holds T of them needs ceil(n / T) block groups of
`blocks_per_span` blocks each. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol


@dataclass(slots=True)
class Waiting:
    """A sequence whose known tokens are not all computed yet: new, partly computed, or to be recomputed."""

    sequence: int
    arrival: float
    """When its request was accepted; a recomputed sequence keeps it, and so its place in the order."""
    tokens: int
    """Known tokens: the prompt, and the output so far of one that is recomputed."""
    computed: int = 0
    """Tokens whose KV is in the arena, or will be when a job ends that ends soon: where its next chunk
    starts."""
    groups: int = 0
    """Block groups it holds."""
    open: bool = False
    """Whether it has a slot at the worker."""
    in_job: bool = False
    """Whether a chunk of it runs."""
    priority: int = 0
    """Higher goes first."""
    limit: int = 0
    """Length at which it finishes. 0: unknown."""
    tenant: str = ""
    """Whose it is."""
    deadline: float = math.inf
    """When it has to be finished."""
    emitted: bool = False
    """Whether its client has tokens already: it is computed again, or goes on after a scheduler's death."""


@dataclass(slots=True)
class Running:
    """A sequence whose known tokens are all computed but the last, so that it can decode; or that is in a
    decode job, in whose first step they are."""

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
    it will be at that end, or, where the lease was ended, no less."""
    priority: int = 0
    """As in `Waiting`."""
    tenant: str = ""
    """Whose it is."""
    prompt: int = 0
    """Tokens of its prompt. 0: unknown."""


@dataclass(frozen=True)
class ModelSnapshot:
    """A model of the unit. What can be said of one alone is computed once, when somebody asks."""

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
    ttft_target: float = 0.0
    """Seconds from a request's arrival in which its first token should come. 0: none."""
    tpot_target: float = 0.0
    """Seconds between two tokens of a sequence that should not be exceeded on average. 0: none."""

    @cached_property
    def by_age(self) -> tuple[Running, ...]:
        """What can decode, oldest first."""
        return tuple(sorted(self.running, key=lambda r: (r.arrival, r.sequence)))

    @cached_property
    def idle(self) -> tuple[Running, ...]:
        """What a decode job may have: sequences in none or in one that ends soon, oldest first."""
        return tuple(r for r in self.by_age if r.renew or not r.in_job)

    @cached_property
    def any_idle(self) -> bool:
        """Whether there is any such sequence."""
        return any(r.renew or not r.in_job for r in self.running)

    @cached_property
    def left(self) -> int:
        """Tokens that those which decode may still generate."""
        return sum(r.limit - r.length for r in self.running)

    @cached_property
    def begun(self) -> tuple[Waiting, ...]:
        """Those whose prompt was begun."""
        return tuple(w for w in self.waiting if w.open)

    @cached_property
    def promised(self) -> int:
        """Blocks that prompts which were begun are still to get."""
        return sum(self.missing(w) for w in self.begun)

    def missing(self, waiting: Waiting) -> int:
        """Blocks beyond those that it holds, for all of its known tokens. One that was in a decode job which
        never ran may hold more."""
        return max(0, self.spans(waiting.tokens) - waiting.groups) * self.blocks_per_span

    def spans(self, tokens: int) -> int:
        """Block groups that `tokens` tokens take."""
        return -(-tokens // self.tokens_per_block)


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
    """Whether it is near its end, or its lease was ended: the one that is to follow may be started, and runs
    when this one has ended."""
    last_step: bool = False
    """Whether it will end with the step that runs."""
    fresh: bool = False
    """Whether it is a decode job that no step was heard of: ended now, it may have done nothing, and its
    model would have lost its turn."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A unit at one moment."""

    models: tuple[ModelSnapshot, ...]
    """By name."""
    pool: Pool
    jobs: tuple[RunningJob, ...] = ()
    lanes: int = 1
    """Decode jobs, of different models, that run side by side."""
    joins: bool = False
    """Whether decode jobs may have prompts."""


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
    borrow: bool = True
    """Whether the model may hold more blocks than its quota for it; if not, the pool refuses."""


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Start a decode job of up to `steps` steps with a compute share in (0, 1] beside a prefill job; alone it
    has all of the device."""

    model: str
    sequences: tuple[int, ...]
    steps: int
    share: float
    borrow: bool = True
    """As in `PrefillJob`."""
    exclusive: bool = False
    """Whether no other decode job may run beside it, on a device that has room for several."""
    prompts: tuple[Chunk, ...] = ()
    """What is left of the prompts of waiting sequences: computed in the first step, in the same pass over the
    weights, which samples a token of each; from then on they decode with the others. Only where the snapshot
    says `joins`."""


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


@dataclass(frozen=True, slots=True)
class Refuse:
    """Turn away a sequence that was not begun."""

    sequence: int
    retry_after: float
    """Seconds after which another attempt makes sense. 0: none does."""


@dataclass(frozen=True, slots=True)
class AskAgain:
    """Nothing more is to be done now, but there may be at a known time: decide then, whatever happens."""

    at: float


Decision = PrefillJob | DecodeJob | Preempt | EndLease | AdaptQuotas | Refuse | AskAgain


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job ended as asked."""

    kind: Literal["prefill", "decode"]
    model: str
    tokens: int
    """Prompt tokens computed, those found in the prefix cache not among them, or tokens decoded."""
    seconds: float
    """Execution time in the executor."""
    steps: int = 1
    """Steps that ran; of a prefill job 1."""
    context: int = 0
    """Tokens before those computed, summed over the sequences, at the job's start."""
    beside: float = 0.0
    """Part of `seconds`, 0 to 1, in which a job of the other kind ran too."""
    tenants: Mapping[str, int] = field(default_factory=dict)
    """`tokens` by tenant."""
    together: float = 0.0
    """As `beside`, for a decode job and those of other models."""
    prompts: Mapping[str, float] = field(default_factory=dict)
    """Tokens of prompts that a decode job computed in its first step, by tenant; not among `tokens`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request was served to its end, or to its deadline."""

    sequence: int
    model: str
    output: int
    """Tokens that it generated."""
    most: int
    """Tokens that it might have generated."""
    seconds: float
    """From its arrival to its end."""
    expired: bool = False
    """Whether its deadline passed before it was done."""


Event = JobEnded | Finished


class Policy(Protocol):
    """Decides what a unit does next. One object per unit: it may remember what it saw."""

    def decide(self, snapshot: Snapshot, now: float) -> Sequence[Decision]:
        """What to do now, in order. Called whenever something ended, arrived or was freed; cheap."""

    def observe(self, event: Event) -> None:
        """Learn from what happened."""


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What operators may tune. The switches are those of `mux`; the other policies go without."""

    chunk_tokens: int = 512
    """Most prompt tokens of a prefill job."""
    chunk_seconds: float = 0.5
    """Aim for prefill jobs no longer than this: a cancelled prompt holds its blocks until its chunk ends."""
    lease_steps: int = 8
    """Most steps of a decode job."""
    prefill_share: float = 0.5
    """Compute share of a prefill job beside decode jobs."""
    decode_share: float = 0.5
    """Compute share of decode jobs beside a prefill job."""
    adapt_seconds: float = 5.0
    """Time between adaptations of quotas."""
    min_share: float = 0.2
    """Least quota of a model, as a part of an equal share of the arena."""
    quantum: float = 1.0
    """`temporal`: seconds that a model has the device for while others want it."""
    turn_seconds: float = 0.2
    """`mux`: seconds that one turn of every model that decodes should take in all."""
    stretch: float = 8.0
    """`mux`: how many times its time alone on the device a request may take, where its model has no targets:
    the order of prompts follows from it, and how many sequences decode at once."""
    chunked: bool = True
    """Prompts come in chunks of about `turn_seconds`; off: of `chunk_seconds`."""
    gather: bool = True
    """Short prompts share a pass over the weights: with what decodes of their model, or with others that come
    soon."""
    borrow: bool = True
    """What nobody claims is lent beyond quotas, and given back by recompute; off: quotas are hard."""
    slack: bool = True
    """Prompts by how much time they have left, fewer sequences at once than would miss their targets; off:
    by round-robin and age."""
    turns: bool = True
    """Models decode equally many steps per turn, shorter ones the more they take; off: fixed numbers."""
    shares: bool = True
    """The compute share of prefill jobs, and pauses between them, follow the targets for time per output
    token; off: fixed shares."""
    priorities: bool = True
    """Requests of higher priority go first."""
    fairness: bool = True
    """Tenants that had more than others wait behind them."""
    admission: bool = True
    """Requests that cannot be finished before their deadline are refused."""

    def plain(self) -> PolicyOptions:
        """Without what `mux` adds to ADBS."""
        return replace(
            self,
            chunked=False,
            gather=False,
            borrow=False,
            slack=False,
            turns=False,
            shares=False,
            priorities=False,
            fairness=False,
            admission=False,
        )
