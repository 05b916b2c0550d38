"""`Lane`: jobs of one kind, and the one of them that an executor runs. `Lanes`: both of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog

from muxserve.engine.messages import UNFINISHED, JobDone, PrefillJob, Shares, Step
from muxserve.engine.pool import BlockPool
from muxserve.worker.executors import ExecutorOptions, ExecutorProcess, Kind
from muxserve.worker.jobs import Plan, plan, plan_chunks
from muxserve.worker.orders import DecodeOrder, Ended, Order, Outcome, PrefillOrder, Refused, Tokens
from muxserve.worker.sequences import SequenceBook

log = structlog.get_logger(__name__)

MAX_WAITING = 16
"""Jobs that may wait in one lane; a scheduler has one or two."""


class JobOwner(Protocol):
    """Where a job came from."""

    book: SequenceBook

    def send(self, event: Tokens | Ended) -> None:
        """Tell of a job's progress; must not block."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    owner: JobOwner
    order: Order


@dataclass(slots=True)
class _Running:
    owner: JobOwner
    order: Order
    plan: Plan
    job: int
    """The engine's number for the part of the order that runs."""
    steps: int = 0
    seconds: float = 0.0
    """Of the parts that have ended."""
    shares: Shares | None = None
    """None: the executor has not been given the job yet."""


class Lane:
    """Runs orders of one kind one at a time, in the order in which they came. Blocks are reserved when a job
    starts, so that one that waits sees what the one before it has done."""

    def __init__(self, pool: BlockPool, numbers: Iterator[int], divide: Callable[[], None]) -> None:
        """numbers: for jobs; one executor may have those of both lanes. divide: called when a job is about to
        start or has ended; calls `use_shares` of all lanes. `executor` has to be set before the first job."""
        self.executor: ExecutorProcess
        self._pool = pool
        self._divide = divide
        self._waiting: deque[_Waiting] = deque()
        self._running: _Running | None = None
        self._numbers = numbers
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def share(self) -> float:
        """Compute share of the job that runs; 0 = none does."""
        return self._running.order.share if self._running else 0.0

    def use_shares(self, shares: Shares) -> None:
        """Those of all jobs that run now: this lane's goes on by them from its next step on."""
        running = self._running
        if running is None or running.shares == shares:
            return
        if running.shares is not None:
            self.executor.use_shares(running.job, shares)
        running.shares = shares

    def submit(self, owner: JobOwner, order: Order) -> None:
        """Run `order` when its turn comes; too many waiting ones and it fails at once."""
        if len(self._waiting) >= MAX_WAITING:
            owner.book.close(order.sequences)
            self._tell_end(
                owner, order, Plan(), Outcome.FAILED, error=f"{MAX_WAITING} jobs are waiting already"
            )
            return
        self._waiting.append(_Waiting(owner, order))
        self._start_next()

    def end_lease(self, owner: JobOwner, job: int) -> None:
        """End that job soon; one that waits is over at once."""
        running = self._running
        if running is not None and running.owner is owner and running.order.job == job:
            self.executor.end_lease(running.job)
            return
        for waiting in self._waiting:
            if waiting.owner is owner and waiting.order.job == job:
                self._waiting.remove(waiting)
                self._tell_end(owner, waiting.order, Plan(), Outcome.OK)
                return

    async def drop(self, owner: JobOwner) -> None:
        """Drop the owner's jobs; returns when the one that runs, if it is the owner's, has ended."""
        self._waiting = deque(w for w in self._waiting if w.owner is not owner)
        while (running := self._running) is not None and running.owner is owner:
            self.executor.end_lease(running.job)
            await self._idle.wait()

    def _start_next(self) -> None:
        while self._running is None and self.executor.ready and self._waiting:
            waiting = self._waiting.popleft()
            owner, order = waiting.owner, waiting.order
            job = next(self._numbers)
            running = _Running(owner, order, plan(order, job, owner.book), job)
            if running.plan.message is None:
                self._release(running)
                self._tell_end(owner, order, running.plan, Outcome.OK)
                continue
            self._running = running
            self._idle.clear()
            self._divide()
            self._submit(running)

    def _submit(self, running: _Running) -> None:
        message = running.plan.message
        assert message is not None and running.shares is not None
        self.executor.submit(msgspec.structs.replace(message, shares=running.shares))

    def _go_on(self, running: _Running) -> bool:
        """Start the next part of an order, if there is one."""
        if not running.plan.later or not isinstance(running.order, PrefillOrder):
            return False
        running.job = next(self._numbers)
        plan_chunks(running.plan, running.order, running.job, running.owner.book)
        if running.plan.message is None:
            return False
        self._submit(running)
        return True

    def on_report(self, report: Step | JobDone) -> None:
        """Of a job of the executor's, which may be another lane's."""
        running = self._running
        if running is None or report.job != running.job:
            return
        if isinstance(report, Step):
            self._on_step(running, report)
            return
        running.steps += report.steps
        running.seconds += report.seconds
        if report.error:
            self._end(running, Outcome.FAILED, report.error)
            return
        if isinstance(running.plan.message, PrefillJob):
            for chunk in running.plan.message.chunks:
                if (sequence := running.plan.sequences.get(chunk.slot)) is not None:
                    running.owner.book.computed(sequence, chunk.end)
        if not self._go_on(running):
            self._end(running, Outcome.OK)

    def _on_step(self, running: _Running, step: Step) -> None:
        sequences = [running.plan.sequences[slot] for slot in step.slots]
        decoding = isinstance(running.order, DecodeOrder)
        for sequence, position, finished in zip(sequences, step.positions, step.finished, strict=True):
            sequence.known = position + 1
            sequence.finished = finished != UNFINISHED
            if decoding:
                sequence.ordered = sequence.computed = position
        numbers = tuple(sequence.number for sequence in sequences)
        if numbers:
            running.owner.send(Tokens(running.order.job, numbers, step))
        for slot in step.failed:
            sequence = running.plan.sequences.pop(slot)
            running.plan.refused.append((sequence.number, Refused.NOT_OPEN))
            running.plan.problems.append(f"sequence {sequence.number}: its logits are not finite")
            running.owner.book.prefixes.withdraw(sequence)
            running.owner.book.leave(sequence)
            running.owner.book.close([sequence.number])
        if decoding:
            # Finished rows have left the executor's batch: their blocks need not wait for the lease's end.
            for slot, sequence in zip(step.slots, sequences, strict=True):
                if sequence.finished:
                    del running.plan.sequences[slot]
                    running.owner.book.leave(sequence)

    def on_executor(self) -> None:
        """The executor is ready, or has died."""
        if self.executor.ready is None and (running := self._running) is not None:
            self._end(running, Outcome.EXECUTOR_LOST, f"{self.executor.title} died")
        self._start_next()

    def _end(self, running: _Running, outcome: Outcome, error: str = "") -> None:
        self._running = None
        if outcome is not Outcome.OK:
            book = running.owner.book
            for sequence in running.plan.sequences.values():
                sequence.tainted = True
            # All of the order's, those that were refused or whose turn had not come, too: their scheduler
            # takes them for lost.
            book.close(running.order.sequences)
        self._release(running)
        self._tell_end(
            running.owner, running.order, running.plan, outcome, running.steps, running.seconds, error
        )
        self._idle.set()
        self._start_next()
        self._divide()

    def _release(self, running: _Running) -> None:
        """Its sequences are in it no longer."""
        for sequence in running.plan.sequences.values():
            running.owner.book.leave(sequence)

    def _tell_end(
        self,
        owner: JobOwner,
        order: Order,
        made: Plan,
        outcome: Outcome,
        steps: int = 0,
        seconds: float = 0.0,
        error: str = "",
    ) -> None:
        problems = "; ".join(filter(None, [error, *made.problems]))
        if problems:
            log.warning(
                "job trouble", job=order.job, model=order.model, outcome=outcome.name, reason=problems
            )
        refused = tuple(made.refused)
        available = self._pool.available_blocks
        cached = made.cached_tokens
        owner.send(Ended(order.job, outcome, steps, seconds, refused, problems, available, cached))


class Lanes:
    """A prefill lane and a decode lane over one arena, and how they share the device.

    environments: of each executor, by its kind: one for both lanes, or one for each.
    """

    def __init__(
        self,
        options: ExecutorOptions,
        environments: Mapping[Kind, Mapping[str, str]],
        pool: BlockPool,
        on_change: Callable[[], None],
    ) -> None:
        numbers = itertools.count(1)
        self.prefill = Lane(pool, numbers, self._divide)
        self.decode = Lane(pool, numbers, self._divide)
        self._on_change = on_change
        self.executors = tuple(
            self._executor(kind, options, environment) for kind, environment in environments.items()
        )

    async def start(self) -> None:
        """Returns when the executors are ready. Raises ExecutorFailed."""
        await asyncio.gather(*(executor.start() for executor in self.executors))

    async def stop(self) -> None:
        """End the executors."""
        await asyncio.gather(*(executor.stop() for executor in self.executors))

    async def drop(self, owner: JobOwner) -> None:
        """Drop the owner's jobs; returns when none of them runs."""
        await asyncio.gather(self.prefill.drop(owner), self.decode.drop(owner))

    def _executor(
        self, kind: Kind, options: ExecutorOptions, environment: Mapping[str, str]
    ) -> ExecutorProcess:
        lanes = {"prefill": [self.prefill], "decode": [self.decode], "both": [self.prefill, self.decode]}[
            kind
        ]

        def on_report(report: Step | JobDone) -> None:
            for lane in lanes:
                lane.on_report(report)

        def on_change() -> None:
            for lane in lanes:
                lane.on_executor()
            self._on_change()

        executor = ExecutorProcess(kind, options, environment, on_report, on_change)
        for lane in lanes:
            lane.executor = executor
        return executor

    def _divide(self) -> None:
        """Have the jobs that run share the device."""
        shares = Shares(self.prefill.share, self.decode.share)
        # A job that is about to start is handed over after this: who gives up a part for it is told first.
        self.decode.use_shares(shares)
        self.prefill.use_shares(shares)
