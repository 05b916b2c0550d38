"""`drive`: sends requests when they are due, whatever became of those before, and notes what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.targets import Failed, Late, Refused, Reply, Target
from muxserve.bench.workload import Request

Deadline = Callable[[Request], float | None]
"""Seconds from its arrival that a request may take; None: as long as it likes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends, and what it may hold."""

    drain: float = 60.0
    """Seconds after the last arrival for which answers are waited for; what is left is UNFINISHED."""
    open_requests: int = 8192
    """Requests under way at once. One more FAILS: arrivals are never delayed."""


@dataclass(slots=True)
class Progress:
    """A run so far, for who shows it."""

    total: int
    sent: int = 0
    ended: int = 0
    tokens: int = 0
    by_status: dict[Status, int] = field(default_factory=dict)

    @property
    def open(self) -> int:
        """Requests under way."""
        return self.sent - self.ended


@dataclass(frozen=True, slots=True)
class Run:
    """What a run saw."""

    outcomes: tuple[Outcome, ...]
    """In order of intended arrival."""
    seconds: float
    """From its begin to the last answer."""
    cpu_seconds: float
    """Processor time that the generator's process took meanwhile."""
    stopped: bool
    """Whether it was ended early."""
    tokens: tuple[int, ...] = ()
    """Output tokens that arrived in each second of the run, of whatever request."""

    def token_rate(self, begin: int, end: int) -> float:
        """Output tokens per second that arrived in [begin, end), of requests that have ended and others."""
        return sum(self.tokens[begin:end]) / (end - begin)

    @property
    def worst_lag(self) -> float:
        """Most seconds that a request was sent after it was due."""
        return max((one.sent - one.at for one in self.outcomes), default=0.0)


class Generator:
    """One run. `watch` is called with each outcome; when it returns True, the run ends at once."""

    def __init__(
        self,
        requests: Sequence[Request],
        targets: Mapping[str, Target],
        deadline: Deadline = lambda _: None,
        limits: Limits | None = None,
        watch: Callable[[Outcome], bool] = lambda _: False,
    ) -> None:
        """requests: in order of arrival. targets: by model."""
        self._requests = requests
        self._targets = targets
        self._deadline = deadline
        self._limits = limits or Limits()
        self._watch = watch
        self._outcomes: list[Outcome | None] = [None] * len(requests)
        self._stop = asyncio.Event()
        self._begin = 0.0
        self._tokens: dict[int, int] = {}
        self.progress = Progress(len(requests))

    async def run(self) -> Run:
        """Send everything and wait for the answers."""
        cpu = time.process_time()
        self._begin = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(self._stop.wait())
        try:
            for number, request in enumerate(self._requests):
                if (wait := request.at - self._now()) > 0:
                    await asyncio.wait((stopped,), timeout=wait)
                if self._stop.is_set():
                    break
                task = asyncio.create_task(self._one(number, request, self._now()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await self._finish(tasks, stopped)
        finally:
            stopped.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(stopped, *tasks, return_exceptions=True)
        outcomes = tuple(one for one in self._outcomes if one is not None)
        tokens = tuple(self._tokens.get(second, 0) for second in range(max(self._tokens, default=-1) + 1))
        return Run(outcomes, self._now(), time.process_time() - cpu, self._stop.is_set(), tokens)

    async def _finish(self, tasks: set[asyncio.Task[None]], stopped: asyncio.Task[bool]) -> None:
        end = self._now() + self._limits.drain
        while tasks and not self._stop.is_set() and (left := end - self._now()) > 0:
            await asyncio.wait((*tasks, stopped), timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _one(self, number: int, request: Request, sent: float) -> None:
        """Send one request; its outcome is noted however it ends."""
        reply = Reply()
        first: float | None = None
        last, known = 0.0, 0

        def arrived() -> None:
            nonlocal first, last, known
            last = self._now()
            self._tokens[int(last)] = self._tokens.get(int(last), 0) + reply.tokens - known
            self.progress.tokens += reply.tokens - known
            known = reply.tokens
            if first is None:
                first = last

        status, error, retry_after = Status.OK, "", None
        self.progress.sent += 1
        try:
            if self.progress.open > self._limits.open_requests:
                raise Failed(f"more than {self._limits.open_requests} requests are under way")
            allowed = self._deadline(request)
            timeout = None if allowed is None else max(0.001, request.at + allowed - self._now())
            await self._targets[request.model].send(request, timeout, reply, arrived)
        except Refused as refused:
            status, error, retry_after = Status.REFUSED, str(refused), refused.retry_after
        except Late as late:
            status, error = Status.LATE, str(late)
        except Failed as failed:
            status, error = Status.FAILED, str(failed)
        except asyncio.CancelledError:
            status = Status.UNFINISHED
        outcome = Outcome(
            at=request.at,
            sent=sent,
            model=request.model,
            tenant=request.tenant,
            priority=request.priority,
            prompt_tokens=reply.prompt_tokens or request.prompt_tokens,
            asked_tokens=request.output_tokens,
            tokens=reply.tokens,
            first=first,
            end=last if status is Status.OK else self._now(),
            status=status,
            error=error,
            retry_after=retry_after,
        )
        self._note(number, outcome)

    def _note(self, number: int, outcome: Outcome) -> None:
        self._outcomes[number] = outcome
        progress = self.progress
        progress.ended += 1
        progress.by_status[outcome.status] = progress.by_status.get(outcome.status, 0) + 1
        if self._watch(outcome):
            self._stop.set()
