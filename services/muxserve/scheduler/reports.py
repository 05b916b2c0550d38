"""`Reports`: what the worker reports, applied to the requests of a unit."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from google.rpc import code_pb2

from muxserve.scheduler.gateways import GatewayHub
from muxserve.scheduler.overlap import Overlap
from muxserve.scheduler.policy.interface import JobEnded, Policy
from muxserve.scheduler.requests import Event, Request
from muxserve.scheduler.seats import Job, Seats
from muxserve.scheduler.tally import Tally
from muxserve.v1 import common_pb2, scheduler_pb2, worker_pb2

log = structlog.get_logger(__name__)

MAX_TROUBLES = 8
"""Times in a row that a request may lose its sequence to a fault before it fails."""
FIRST_PAUSE, LAST_PAUSE = 0.01, 1.0
"""Seconds that a request which the worker refused is left alone, doubling."""

FINISH = {
    worker_pb2.SEQUENCE_STATE_RUNNING: common_pb2.FINISH_REASON_UNSPECIFIED,
    worker_pb2.SEQUENCE_STATE_STOP: common_pb2.FINISH_REASON_STOP,
    worker_pb2.SEQUENCE_STATE_LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


@dataclass(slots=True)
class News:
    """What a gateway is told of a message of the worker."""

    events: list[Event] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, number: int, index: int, token_ids: list[int]) -> None:
        """Tokens of a request, from `index` of its output on."""
        self.numbers.append(number)
        self.indexes.append(index)
        self.counts.append(len(token_ids))
        self.token_ids += token_ids

    def new_tokens(self) -> scheduler_pb2.NewTokens | None:
        """None: there are none."""
        if not self.numbers:
            return None
        return scheduler_pb2.NewTokens(
            numbers=self.numbers, indexes=self.indexes, counts=self.counts, token_ids=self.token_ids
        )


class RequestKeeper(Protocol):
    """The unit whose requests these are."""

    name: str

    def finish(self, request: Request, event: Event) -> None:
        """It is over and its gateway was sent `event`."""

    def fail(self, request: Request, code: int, message: str) -> None:
        """It cannot be served."""

    def ask_turn(self) -> None:
        """There may be something to decide."""


class Reports:
    """Applies a worker's messages."""

    def __init__(
        self, owner: RequestKeeper, seats: Seats, policy: Policy, hub: GatewayHub, tally: Tally
    ) -> None:
        self._owner = owner
        self._seats = seats
        self._policy = policy
        self._hub = hub
        self._tally = tally
        self._overlap = Overlap()

    def on_step(self, step: worker_pb2.StepEvents) -> None:
        """Tokens: one message per gateway."""
        job = self._seats.progress(step.job, step.steps)
        if job is None:
            return
        news: dict[str, News] = defaultdict(News)
        ended: list[tuple[Request, Event]] = []
        token_ids, end, heard = list(step.token_ids), 0, 0
        rows = zip(step.sequences, step.positions, step.counts, step.states, strict=True)
        for number, position, count, state in rows:
            start, end = end, end + count
            sequence = self._seats.sequences.get(number)
            if sequence is None or (request := sequence.request) is None:
                continue
            if position != request.known:
                self._disagree(request, f"token at position {position} instead of {request.known}")
                continue
            index, new = len(request.output), token_ids[start:end]
            logprobs = step.logprobs[start:end] if request.queued.HasField("logprobs") else ()
            request.extend(new, logprobs)
            heard += count
            sequence.computed = request.known - 1
            if job.kind == "decode":
                job.tenants[request.queued.tenant] += count
            finish = FINISH.get(state, common_pb2.FINISH_REASON_UNSPECIFIED)
            if finish or logprobs or index == request.resumed_at:
                event = request.tokens(index, finish)
                news[request.gateway].events.append(event)
                if finish:
                    ended.append((request, event))
            else:
                news[request.gateway].add(request.number, index, new)
        self._tally.generated[job.model] += heard
        if job.kind == "decode":
            job.tokens += heard
        for gateway, told in news.items():
            self._hub.send(gateway, told.events, told.new_tokens())
        if ended:
            self._leave([request for request, _ in ended])
            for request, event in ended:
                self._owner.finish(request, event)
        if ended or self._seats.ends_soon(job):
            self._owner.ask_turn()

    def _leave(self, requests: Iterable[Request]) -> None:
        """Close the sequences of requests that have finished, all in one message."""
        sequences = [request.sequence for request in requests if request.sequence is not None]
        for sequence in sequences:
            self._seats.leave(sequence)
        self._seats.close(sequences)

    def on_done(self, done: worker_pb2.JobDone) -> None:
        """A job has ended, one way or another."""
        job = self._seats.end(done.job, done.steps, done.seconds)
        if job is None or not self._goes_on(job, done):
            self._owner.ask_turn()
        if job is None:
            return
        if done.outcome != worker_pb2.JOB_OUTCOME_OK:
            log.warning("job lost", unit=self._owner.name, model=job.model, kind=job.kind, error=done.error)
            for request in self._seats.lose(job.members.values()):
                self._trouble(request, done.error)
            return
        refused = {refusal.sequence: refusal.reason for refusal in done.refused}
        for number, sequence in job.members.items():
            if number in refused:
                self._refused(sequence.request, refused[number])
            elif job.kind == "prefill":
                sequence.computed = job.ends[number]
        self._account(job, done)

    def _goes_on(self, job: Job, done: worker_pb2.JobDone) -> bool:
        """Whether a lease ended as it should and the next one of the same model is there, for some time:
        nothing came free that could be given to somebody."""
        as_asked = done.outcome == worker_pb2.JOB_OUTCOME_OK and not done.refused and not job.ending
        next_one = self._seats.followed(job) if job.kind == "decode" and as_asked else None
        if next_one is None or self._seats.ends_soon(next_one):
            return False
        return all(sequence.request is not None for sequence in job.members.values())

    def _account(self, job: Job, done: worker_pb2.JobDone) -> None:
        # What the prefix cache had was not computed, and says nothing about how fast the device is.
        decoded = job.kind == "decode"
        tokens = job.tokens if decoded else job.tokens - done.cached_tokens
        asked = sum(job.prompts.values())
        computed = (asked - done.cached_tokens if done.steps else 0) if decoded else tokens
        now = asyncio.get_running_loop().time()
        running = [(each.kind, each.model, each.ordered) for each in self._seats.jobs.values()]
        beside, together = self._overlap.ended(job.kind, job.model, now, done.seconds, running)
        if not done.refused and tokens:
            steps = max(1, done.steps)
            runs = steps if decoded else 1
            if not job.prompts:
                self._tally.took(job.kind, job.model, runs, done.seconds, beside, tokens)
            self._policy.observe(
                JobEnded(
                    job.kind,
                    job.model,
                    tokens,
                    done.seconds,
                    steps,
                    job.context,
                    beside,
                    job.tenants,
                    together if self._seats.lanes > 1 else 0.0,
                    {tenant: count * computed / asked for tenant, count in job.prompts.items()},
                )
            )
        self._tally.prefilled[job.model] += computed

    def _refused(self, request: Request | None, reason: worker_pb2.RefusalReason.ValueType) -> None:
        """The worker could not take a request's sequence into a job: it is computed anew, a little later."""
        if request is None or request.sequence is None:
            return
        name = worker_pb2.RefusalReason.Name(reason)
        log.warning("sequence refused", unit=self._owner.name, request=request.id, reason=name)
        self._seats.close([request.sequence])
        self._tally.preemptions[request.model] += 1
        pause = min(LAST_PAUSE, FIRST_PAUSE * 2**request.troubles)
        loop = asyncio.get_running_loop()
        request.not_before = loop.time() + pause
        loop.call_later(pause, self._owner.ask_turn)
        self._trouble(request, f"the worker refuses it: {name}")

    def _trouble(self, request: Request, reason: str) -> None:
        """It lost its sequence to a fault; it waits again, unless that happens over and over."""
        request.troubles += 1
        if request.troubles > MAX_TROUBLES:
            self._owner.fail(
                request, code_pb2.INTERNAL, f"gave up after {request.troubles} attempts: {reason}"
            )

    def _disagree(self, request: Request, what: str) -> None:
        """The worker and this unit have lost each other: compute the request anew."""
        log.error("worker out of step", unit=self._owner.name, request=request.id, what=what)
        if request.sequence is not None:
            self._seats.close([request.sequence])
        self._trouble(request, what)
        self._owner.ask_turn()
