"""What a scheduler asks of the worker, and what it is told: the Jobs stream as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from muxserve.engine.messages import Sampling, Step


@dataclass(frozen=True, slots=True)
class Opening:
    """Declares a sequence."""

    sequence: int
    model: str
    tokens: tuple[int, ...]
    """Prompt, and output so far."""
    limit: int
    """Length at which it finishes."""
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, end)` of a sequence."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """A batch of prompt chunks of one model."""

    job: int
    model: str
    chunks: tuple[Chunk, ...]
    share: float
    borrow: bool = False
    """Whether the model may hold more blocks than its quota for it."""
    lead: float = 0.0
    """Seconds before its end when that is to be told."""

    @property
    def sequences(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(chunk.sequence for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DecodeOrder:
    """A batch of sequences of one model, up to `steps` steps."""

    job: int
    model: str
    sequences: tuple[int, ...]
    steps: int
    share: float
    lead: int = 0
    """When this many steps are left, no token is held back."""
    borrow: bool = False
    """As in `PrefillOrder`."""
    exclusive: bool = False
    """Whether no other decode job may run beside it."""
    prompts: frozenset[int] = frozenset()
    """Those of `sequences` of whose known tokens the first step computes what is left."""


Order = PrefillOrder | DecodeOrder


class Refused(Enum):
    """Why a sequence was left out of a job; the names are the proto's."""

    OUT_OF_BLOCKS = "the pool or the quota has no blocks for it"
    OUT_OF_SLOTS = "all of the model's slots are taken"
    NOT_OPEN = "the sequence is not open"
    NO_MODEL = "the model is not loaded"


class Outcome(Enum):
    """How a job ended; the names are the proto's."""

    OK = "as asked, refused sequences apart"
    EXECUTOR_LOST = "the executor died"
    FAILED = "the job failed for a reason of its own"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one step; `sequences[i]` is the one in `step.slots[i]`."""

    job: int
    sequences: tuple[int, ...]
    step: Step


@dataclass(frozen=True, slots=True)
class Nearing:
    """A prefill job will soon have ended."""

    job: int


@dataclass(frozen=True, slots=True)
class QuotasInForce:
    """What became of block quotas."""

    revision: int
    above: tuple[str, ...]
    """Models that have held more than these give them ever since they came."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job has ended. Sequences of one that is not OK are closed."""

    job: int
    outcome: Outcome
    steps: int
    seconds: float
    refused: tuple[tuple[int, Refused], ...]
    error: str
    available_blocks: int
    cached_tokens: int = 0
    """Prompt tokens that were not computed, since the prefix cache had their KV."""
