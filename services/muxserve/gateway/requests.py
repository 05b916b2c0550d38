"""Requests in flight: what schedulers said about them, and what their clients have not yet seen.

Each token is delivered once and in order: an event names the request, the attempt and the index of its first
token; older attempts and tokens that are here already are dropped.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from muxserve.common.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Overloaded,
    ServiceError,
    Unavailable,
)
from muxserve.gateway.pacing import Pacer
from muxserve.v1 import common_pb2, scheduler_pb2

UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens that came since the last look, however many events brought them."""

    token_ids: list[int]
    logprobs: list[common_pb2.Logprobs]
    """One per token, or empty if they were not asked for."""
    finish_reason: common_pb2.FinishReason.ValueType
    """UNSPECIFIED: more will come."""


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request that a client waits for."""

    queued: scheduler_pb2.QueuedRequest
    eager: bool = False
    """Whether its client is told of each token at once: it has stop strings, and any token may end it."""
    admission: asyncio.Task[str] | None = None
    """Puts it into its model's queue; results in the entry's id."""
    attempt: int = 0
    """The newest attempt that was heard of; 0: no scheduler has it yet."""
    scheduler_id: str = ""
    """Who works on that attempt."""
    number: int = 0
    """What new tokens of that scheduler call it. 0: nothing yet."""
    token_ids: list[int] = field(default_factory=list)
    """All tokens received."""
    logprobs: list[common_pb2.Logprobs] = field(default_factory=list)
    """Those of the tokens that were not taken yet."""
    taken: int = 0
    """How many of the tokens were taken."""
    finish_reason: common_pb2.FinishReason.ValueType = UNFINISHED
    error: ServiceError | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        """Unique among all gateways."""
        return self.queued.request_id

    @property
    def over(self) -> bool:
        """Whether schedulers have nothing more to do for it."""
        return self.finish_reason != UNFINISHED or self.error is not None

    def receive(self, tokens: scheduler_pb2.RequestEvent.Tokens) -> bool:
        """Take over new tokens. False: they do not continue what is here, and the request has failed."""
        have, end = len(self.token_ids), tokens.index + len(tokens.token_ids)
        if tokens.finish_reason != UNFINISHED and end < have:
            self.fail(Internal(f"the end after {end} tokens does not continue the {have} received"))
            return False
        if not self.extend(tokens.index, list(tokens.token_ids)):
            return False
        self.logprobs.extend(tokens.logprobs[have - tokens.index :])
        self.finish_reason = tokens.finish_reason
        self.tell()
        return True

    def extend(self, index: int, token_ids: list[int]) -> bool:
        """Take over tokens from `index` on, those that are here already apart. False: they do not continue
        what is here, and the request has failed."""
        have = len(self.token_ids)
        if index > have:
            self.fail(Internal(f"tokens from {index} on do not continue the {have} received"))
            return False
        self.token_ids += token_ids[have - index :]
        return True

    def tell(self) -> None:
        """Let its client have what there is, if there is anything."""
        if self.over or self.taken < len(self.token_ids):
            self._news.set()

    def fail(self, error: ServiceError) -> None:
        """End the request with `error`; tokens not yet taken are dropped."""
        if not self.over:
            self.error = error
            self.tell()

    async def take(self) -> Batch:
        """Wait for news and take all there is. Raises what the request failed with."""
        await self._news.wait()
        self._news.clear()
        if self.error is not None:
            raise self.error
        start, self.taken = self.taken, len(self.token_ids)
        logprobs, self.logprobs = self.logprobs, []
        return Batch(self.token_ids[start:], logprobs, self.finish_reason)


class RequestTable:
    """All requests in flight, at most `limit`.

    What a request gets first and last is told at once, and so are log-probabilities and errors, which come as
    events. For others `Pacer` has the rule.
    """

    def __init__(self, limit: int, longest_wait: float = 0.0) -> None:
        """`longest_wait` of tokens for later ones, in seconds."""
        self._limit = limit
        self._pacer = Pacer(longest_wait)
        self._live: dict[str, LiveRequest] = {}
        self._numbers: dict[str, dict[int, LiveRequest]] = defaultdict(dict)
        """By scheduler: what new tokens of its stream call the requests that it has told of."""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def check_room(self) -> None:
        """Raises Overloaded if there is no room for another request."""
        if len(self._live) >= self._limit:
            raise Overloaded(f"this gateway has {self._limit} requests in flight and takes no more")

    def open(self, queued: scheduler_pb2.QueuedRequest, eager: bool = False) -> LiveRequest:
        """`eager`: as of the request. Raises Overloaded."""
        self.check_room()
        live = self._live[queued.request_id] = LiveRequest(queued, eager)
        return live

    def close(self, live: LiveRequest) -> bool:
        """Forget a request. False: it was forgotten before."""
        if live.number:
            self._numbers[live.scheduler_id].pop(live.number, None)
        return self._live.pop(live.id, None) is not None

    def begin(self, scheduler_id: str) -> None:
        """A new stream of that scheduler: its numbers mean nothing yet."""
        self._numbers[scheduler_id] = {}

    def receive(self, new: scheduler_pb2.NewTokens, scheduler_id: str) -> list[scheduler_pb2.AttachRequest]:
        """Take note of new tokens; returns what to answer."""
        answers = []
        numbers, token_ids, end = self._numbers[scheduler_id], list(new.token_ids), 0
        for number, index, count in zip(new.numbers, new.indexes, new.counts, strict=True):
            start, end = end, end + count
            live = numbers.get(number)
            if live is None:
                message = scheduler_pb2.AttachRequest.Cancel(number=number)
                answers.append(scheduler_pb2.AttachRequest(cancel=message))
            elif live.number != number or live.scheduler_id != scheduler_id or live.over:
                continue  # an older attempt, or one that has ended here
            elif not live.extend(index, token_ids[start:end]):
                answers.append(cancel(live.id))
            elif live.eager or not live.taken:
                live.tell()
            else:
                self._pacer.hold(live.tell, len(self))
        return answers

    def handle(
        self, event: scheduler_pb2.RequestEvent, scheduler_id: str
    ) -> scheduler_pb2.AttachRequest | None:
        """Take note of what scheduler `scheduler_id` says; returns what to answer."""
        live = self._live.get(event.request_id)
        kind = event.WhichOneof("kind")
        if live is None:
            return _gone(event) if kind == "resume_query" else cancel(event.request_id)
        if event.number:
            self._numbers[scheduler_id][event.number] = live
        if event.attempt < live.attempt:
            return None
        live.attempt, live.scheduler_id = event.attempt, scheduler_id
        live.number = event.number or live.number
        match kind:
            case "tokens" if not live.over:
                return None if live.receive(event.tokens) else cancel(live.id)
            case "failed":
                live.fail(_failure(event.failed, live.queued.model))
            case "resume_query":
                return _gone(event) if live.over else _resume(event, live.token_ids)
        return None


def cancel(request_id: str) -> scheduler_pb2.AttachRequest:
    """Asks a scheduler to stop a request."""
    return scheduler_pb2.AttachRequest(cancel=scheduler_pb2.AttachRequest.Cancel(request_id=request_id))


def _gone(event: scheduler_pb2.RequestEvent) -> scheduler_pb2.AttachRequest:
    answer = scheduler_pb2.AttachRequest.Resume(request_id=event.request_id, attempt=event.attempt, gone=True)
    return scheduler_pb2.AttachRequest(resume=answer)


def _resume(event: scheduler_pb2.RequestEvent, token_ids: list[int]) -> scheduler_pb2.AttachRequest:
    answer = scheduler_pb2.AttachRequest.Resume(
        request_id=event.request_id, attempt=event.attempt, emitted_tokens=token_ids
    )
    return scheduler_pb2.AttachRequest(resume=answer)


def _failure(failed: scheduler_pb2.RequestEvent.Failed, model: str) -> ServiceError:
    """The error that the client is to see."""
    retry_after = failed.retry_after_ms / 1000 if failed.retry_after_ms else None
    code = next((c for c in grpc.StatusCode if c.value[0] == failed.code), grpc.StatusCode.INTERNAL)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidArgument("request", failed.message)
        case grpc.StatusCode.NOT_FOUND:
            return NotFound("model", model, failed.message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(failed.message, retry_after)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(failed.message, retry_after if retry_after is not None else 1.0)
    simple = {kind.code: kind for kind in (Aborted, Cancelled, DeadlineExceeded, FailedPrecondition)}
    return simple.get(code, Internal)(failed.message)
