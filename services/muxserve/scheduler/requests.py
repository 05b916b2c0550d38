"""`Request`: an accepted request and how far it is. `Sequence`: its seat at the worker."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from muxserve.common.queue import Delivery
from muxserve.scheduler.policy.interface import Waiting
from muxserve.v1 import common_pb2, scheduler_pb2

Event = scheduler_pb2.RequestEvent
Tokens = scheduler_pb2.RequestEvent.Tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """An open sequence of the worker. One whose request has let go of it stays until its job ends."""

    number: int
    """Unique within the Jobs stream."""
    model: str
    request: Request | None
    groups: int = 0
    """Block groups that it holds, those reserved by a running job included."""
    computed: int = 0
    """Tokens whose KV is written."""
    jobs: list[int] = field(default_factory=list)
    """The jobs it takes part in: the one that runs, and the one that is to follow it."""
    decoded: bool = False
    """Whether it has been in a decode job."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Unix time as gateways state it, in terms of the event loop's."""

    offset: float
    """What is added to Unix time, in seconds."""

    @classmethod
    def now(cls, loop: asyncio.AbstractEventLoop) -> Clock:
        """As both clocks stand. One for all requests of a unit keeps their order."""
        return cls(loop.time() - time.time())

    def loop(self, unix_ms: int) -> float:
        """That moment as loop time."""
        return unix_ms / 1000 + self.offset


@dataclass(slots=True, eq=False)
class Request:
    """A request of this unit, from its delivery to its end. What was emitted is kept until then: a sequence
    that lost its blocks is computed from it, and a gateway that comes back gets it again."""

    number: int
    """What policies call a sequence, and gateways' new tokens the request. Unique within the process; stays
    while sequences at the worker come and go."""
    entry_id: str
    attempt: int
    queued: scheduler_pb2.QueuedRequest
    clock: Clock
    output: list[int] = field(default_factory=list)
    """All tokens generated."""
    logprobs: list[common_pb2.Logprobs] = field(default_factory=list)
    """Of the output from `resumed_at` on, if asked for."""
    resumed_at: int = 0
    """Tokens of the output that an earlier attempt generated: the gateway has them."""
    awaiting_resume: bool = False
    """Whether it waits for the gateway to say what it has."""
    sequence: Sequence | None = None
    troubles: int = 0
    """Times in a row that it lost its sequence to a fault, without a new token."""
    not_before: float = 0.0
    """Loop time before which it is left alone."""
    timer: asyncio.TimerHandle | None = None
    """Runs out at the deadline."""
    view: Waiting | None = None
    """What policies see of it as long as it was not begun."""

    id: str = field(init=False)
    model: str = field(init=False)
    gateway: str = field(init=False)
    arrival: float = field(init=False)
    """Loop time at which it was accepted: its place in the order of service."""
    deadline: float = field(init=False)
    """Loop time at which it has to be finished. Infinite: whenever."""
    prompt: int = field(init=False)
    """Tokens of the prompt."""
    limit: int = field(init=False)
    """Length at which it finishes."""

    def __post_init__(self) -> None:
        # Read once: these are asked for with every token.
        queued = self.queued
        self.id, self.model, self.gateway = queued.request_id, queued.model, queued.gateway_id
        self.arrival = self.clock.loop(queued.accepted_unix_ms)
        due = queued.deadline_unix_ms
        self.deadline = self.clock.loop(due) if due else math.inf
        self.prompt = len(queued.prompt_tokens)
        self.limit = self.prompt + queued.max_tokens

    @classmethod
    def from_delivery(cls, number: int, delivery: Delivery, clock: Clock) -> Request:
        """A request as it comes from the queue."""
        resume = delivery.attempt > 1
        entry, attempt = delivery.entry_id, delivery.attempt
        return cls(number, entry, attempt, delivery.request, clock, awaiting_resume=resume)

    @property
    def known(self) -> int:
        """Known tokens."""
        return self.prompt + len(self.output)

    @property
    def running(self) -> bool:
        """Whether it can decode: all known tokens but the last are computed."""
        return self.sequence is not None and bool(self.output) and self.sequence.computed == self.known - 1

    def extend(self, token_ids: list[int], logprobs: Iterable[common_pb2.Logprobs]) -> None:
        """Tokens were sampled."""
        self.output += token_ids
        self.logprobs.extend(logprobs)
        self.troubles = 0

    def resume(self, emitted: list[int]) -> None:
        """Continue after the tokens that the gateway has."""
        self.output = emitted
        self.resumed_at = len(emitted)
        self.awaiting_resume = False

    def finished_by(self) -> common_pb2.FinishReason.ValueType:
        """How the output that was handed over with a resume ends, if it is complete."""
        if self.output and self.output[-1] in self.queued.stop_token_ids:
            return common_pb2.FINISH_REASON_STOP
        if self.known >= self.limit:
            return common_pb2.FINISH_REASON_LENGTH
        return common_pb2.FINISH_REASON_UNSPECIFIED

    # What its gateway is told

    def started(self) -> Event:
        """It is this scheduler's now; or the question what the gateway has, if that is not known."""
        if self.awaiting_resume:
            query = Event.ResumeQuery()
            return Event(request_id=self.id, attempt=self.attempt, number=self.number, resume_query=query)
        started = Event.Started()
        return Event(request_id=self.id, attempt=self.attempt, number=self.number, started=started)

    def tokens(self, index: int, finish: common_pb2.FinishReason.ValueType) -> Event:
        """Its tokens from `index` on, which is at least `resumed_at`."""
        tokens = Tokens(
            index=index,
            token_ids=self.output[index:],
            logprobs=self.logprobs[index - self.resumed_at :],
            finish_reason=finish,
        )
        return Event(request_id=self.id, attempt=self.attempt, tokens=tokens)

    def failed(self, code: int, message: str, retry_after: float | None = None) -> Event:
        """It cannot be served. `code` is a google.rpc.Code."""
        failed = Event.Failed(code=code, message=message, retry_after_ms=int(1000 * (retry_after or 0)))
        return Event(request_id=self.id, attempt=self.attempt, failed=failed)

    def replay(self) -> list[Event]:
        """All there is to tell a gateway that was away."""
        events = [self.started()]
        if len(self.output) > self.resumed_at:
            events.append(self.tokens(self.resumed_at, common_pb2.FINISH_REASON_UNSPECIFIED))
        return events
