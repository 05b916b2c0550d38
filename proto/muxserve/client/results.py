"""What the inference calls return: values, with no protobuf in them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the model's context was reached."""
    ABORT = "abort"
    """Cancelled by the client or its deadline."""
    ERROR = "error"
    """The service failed; the call raises as well."""
    UNKNOWN = "unknown"
    """A reason that is newer than this SDK."""


class ModelState(StrEnum):
    """A model on its way to being served."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    ASLEEP = "asleep"
    """Its weights are not loaded: the first request wakes it."""
    DRAINING = "draining"
    """Of one of its places: it takes no new requests and is about to be unloaded."""
    UNKNOWN = "unknown"
    """Not said, or a state that is newer than this SDK."""

    @property
    def served(self) -> bool:
        """Whether requests for a model in this state are taken."""
        return self in (ModelState.READY, ModelState.ASLEEP)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant", or whatever the model's template knows."""
    content: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of one generated token."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    """The most likely tokens, most likely first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request used."""

    prompt_tokens: int
    """After the chat template and tokenization."""
    completion_tokens: int
    """An end-of-sequence token included."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer."""

    text: str
    """What became certain with this piece. A token whose text is incomplete (part of a multi-byte character,
    or of a possible stop string) shows up in a later piece."""
    index: int
    """Index of `token_ids[0]` in the whole output."""
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    """One per token if they were asked for, else empty."""
    finish_reason: FinishReason | None
    """None but for the last piece."""
    request_id: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    model: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    """One per token if they were asked for, else empty."""
    finish_reason: FinishReason
    stop_string: str
    """The stop string that ended it, if one did."""
    usage: Usage
    request_id: str

    @property
    def message(self) -> Message:
        """The answer as the next turn of a conversation."""
        return Message("assistant", self.text)


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    state: ModelState
    reason: str
    """Why it is FAILED, else empty."""
    context_length: int
    """Longest sequence, prompt and output together, in tokens."""
    architecture: str
    """Family, for example "llama"."""
    dtype: str
    """"float32" or "bfloat16"."""
    chat: bool
    """Whether it has a chat template."""
    expected_wait: float = 0.0
    """Where it is ASLEEP: seconds that a request would wait for it now. 0: not known. Infinite: what is
    pinned leaves no room for it."""
