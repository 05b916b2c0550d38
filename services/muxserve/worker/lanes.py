"""`Lane`: one job at a time. `JobQueue`: jobs of one kind, and their lanes. `Lanes`: both kinds."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog

from muxserve.engine.messages import UNFINISHED, NearsEnd, PrefillJob, Shares, Step
from muxserve.engine.pool import BlockPool
from muxserve.engine.shares import decode_room
from muxserve.worker.executors import ExecutorOptions, ExecutorProcess, JobReport, Kind
from muxserve.worker.jobs import Plan, plan, plan_chunks
from muxserve.worker.orders import (
    DecodeOrder,
    Ended,
    Nearing,
    Order,
    Outcome,
    PrefillOrder,
    Refused,
    Tokens,
)
from muxserve.worker.sequences import SequenceBook

log = structlog.get_logger(__name__)

MAX_WAITING = 16
"""Jobs that may wait in one lane; a scheduler has one or two."""


class JobOwner(Protocol):
    """Where a job came from."""

    book: SequenceBook

    def send(self, event: Nearing | Tokens | Ended) -> None:
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
    """One job at a time of an executor's. Blocks are reserved when a job starts, so that one that waits sees
    what those before it have done."""

    def __init__(
        self, pool: BlockPool, numbers: Iterator[int], divide: Callable[[], None], free: Callable[[], None]
    ) -> None:
        """numbers: for jobs; one executor may have those of several lanes. divide: called when a job is about
        to start or has ended; calls `use_shares` of all lanes. free: called when there may be something to
        start. `executor` has to be set before the first job."""
        self.executor: ExecutorProcess
        self._pool = pool
        self._numbers = numbers
        self._divide = divide
        self._free = free
        self._running: _Running | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def free(self) -> bool:
        """Whether a job could start."""
        return self._running is None and self.executor.ready is not None

    @property
    def order(self) -> Order | None:
        """What runs."""
        return self._running.order if self._running else None

    def use_shares(self, shares: Shares) -> None:
        """Those of all jobs that run now: this lane's goes on by them from its next step on."""
        running = self._running
        if running is None or running.shares == shares:
            return
        if running.shares is not None:
            self.executor.use_shares(running.job, shares)
        running.shares = shares

    def end_lease(self, owner: JobOwner, job: int) -> bool:
        """End that job soon if it runs here; whether it does."""
        running = self._running
        if running is None or running.owner is not owner or running.order.job != job:
            return False
        self.executor.end_lease(running.job)
        return True

    async def drop(self, owner: JobOwner) -> None:
        """End the owner's job; returns when it has ended."""
        while (running := self._running) is not None and running.owner is owner:
            self.executor.end_lease(running.job)
            await self._idle.wait()

    def start(self, owner: JobOwner, order: Order) -> None:
        """Run an order; the lane is free again at once if there is nothing to do."""
        job = next(self._numbers)
        running = _Running(owner, order, plan(order, job, owner.book), job)
        if running.plan.message is None:
            self._release(running)
            tell_end(self._pool, owner, order, running.plan, Outcome.OK)
            return
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

    def on_report(self, report: JobReport) -> None:
        """Of a job of the executor's, which may be another lane's."""
        running = self._running
        if running is None or report.job != running.job:
            return
        if isinstance(report, Step):
            self._on_step(running, report)
            return
        if isinstance(report, NearsEnd):
            if not running.plan.later:
                running.owner.send(Nearing(running.order.job))
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
        if running.plan.prompts:
            # Steps after the first compute nothing that is published.
            for slot, sequence in zip(step.slots, sequences, strict=True):
                if slot in running.plan.prompts:
                    running.owner.book.prefixes.publish(sequence)
            running.plan.prompts.clear()
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
        self._free()

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
        tell_end(
            self._pool,
            running.owner,
            running.order,
            running.plan,
            outcome,
            running.steps,
            running.seconds,
            error,
        )
        self._idle.set()
        self._free()
        self._divide()

    def _release(self, running: _Running) -> None:
        """Its sequences are in it no longer."""
        for sequence in running.plan.sequences.values():
            running.owner.book.leave(sequence)


class JobQueue:
    """Orders of one kind in the order in which they came, and the lanes that run them. Those of one model run
    one after the other: they may have sequences in common. An exclusive one runs with none beside it."""

    def __init__(
        self,
        pool: BlockPool,
        numbers: Iterator[int],
        divide: Callable[[], None],
        lanes: int = 1,
        most: Callable[[], int] | None = None,
    ) -> None:
        """`lanes`: how many can run at once; `most`: how many may now, if not that many."""
        self.lanes = tuple(Lane(pool, numbers, divide, self.start) for _ in range(lanes))
        self._most = most or (lambda: lanes)
        self._pool = pool
        self._waiting: deque[_Waiting] = deque()

    @property
    def shares(self) -> list[float]:
        """Compute shares of the jobs that run."""
        return [order.share for order in self._running]

    def use_shares(self, shares: Shares) -> None:
        """Those of all jobs that run now: this queue's go on by them from their next steps on."""
        for lane in self.lanes:
            lane.use_shares(shares)

    def submit(self, owner: JobOwner, order: Order) -> None:
        """Run `order` when its turn comes; too many waiting ones and it fails at once."""
        if len(self._waiting) >= MAX_WAITING:
            owner.book.close(order.sequences)
            error = f"{MAX_WAITING} jobs are waiting already"
            tell_end(self._pool, owner, order, Plan(), Outcome.FAILED, error=error)
            return
        self._waiting.append(_Waiting(owner, order))
        self.start()

    def end_lease(self, owner: JobOwner, job: int) -> None:
        """End that job soon; one that waits is over at once."""
        if any(lane.end_lease(owner, job) for lane in self.lanes):
            return
        for waiting in self._waiting:
            if waiting.owner is owner and waiting.order.job == job:
                self._waiting.remove(waiting)
                tell_end(self._pool, owner, waiting.order, Plan(), Outcome.OK)
                return

    async def drop(self, owner: JobOwner) -> None:
        """Drop the owner's jobs; returns when those that run, if they are the owner's, have ended."""
        self._waiting = deque(w for w in self._waiting if w.owner is not owner)
        await asyncio.gather(*(lane.drop(owner) for lane in self.lanes))

    def start(self) -> None:
        """Start what can."""
        for lane in self.lanes:
            while lane.free and len(self.shares) < self._most() and (waiting := self._next()) is not None:
                self._waiting.remove(waiting)
                lane.start(waiting.owner, waiting.order)

    def _next(self) -> _Waiting | None:
        running = self._running
        if any(_exclusive(order) for order in running):
            return None
        busy = {order.model for order in running}
        first = next((waiting for waiting in self._waiting if waiting.order.model not in busy), None)
        return None if first and running and _exclusive(first.order) else first

    @property
    def _running(self) -> list[Order]:
        return [order for lane in self.lanes if (order := lane.order) is not None]


def _exclusive(order: Order) -> bool:
    return isinstance(order, DecodeOrder) and order.exclusive


def tell_end(
    pool: BlockPool,
    owner: JobOwner,
    order: Order,
    made: Plan,
    outcome: Outcome,
    steps: int = 0,
    seconds: float = 0.0,
    error: str = "",
) -> None:
    """Tell the owner of an order how it ended, and the log of what went wrong."""
    problems = "; ".join(filter(None, [error, *made.problems]))
    if problems:
        log.warning("job trouble", job=order.job, model=order.model, outcome=outcome.name, reason=problems)
    refused, available = tuple(made.refused), pool.available_blocks
    owner.send(Ended(order.job, outcome, steps, seconds, refused, problems, available, made.cached_tokens))


class Lanes:
    """Queues of prefill and of decode jobs over one arena, and how these share the device.

    executors: the kinds of jobs that each takes, and what it has in its environment: one for both kinds, or
    one for prefill and at least one for decode.
    """

    def __init__(
        self,
        options: ExecutorOptions,
        executors: Sequence[tuple[Kind, Mapping[str, str]]],
        pool: BlockPool,
        on_change: Callable[[], None],
    ) -> None:
        numbers = itertools.count(1)
        decode = sum(kind != "prefill" for kind, _ in executors)
        self._cores = options.cores
        self.prefill = JobQueue(pool, numbers, self._divide)
        self.decode = JobQueue(pool, numbers, self._divide, decode, self._most_decoding)
        self._on_change = on_change
        decoders = iter(self.decode.lanes)
        self.executors = tuple(
            self._executor(
                kind,
                options,
                environment,
                [
                    *(self.prefill.lanes if kind != "decode" else ()),
                    *((next(decoders),) if kind != "prefill" else ()),
                ],
            )
            for kind, environment in executors
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
        self, kind: Kind, options: ExecutorOptions, environment: Mapping[str, str], lanes: Sequence[Lane]
    ) -> ExecutorProcess:
        def on_report(report: JobReport) -> None:
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
        prefill, decode = self.prefill.shares, self.decode.shares
        shares = Shares(max(prefill, default=0.0), max(decode, default=0.0), max(1, len(decode)))
        # A job that is about to start is handed over after this: who gives up a part for it is told first.
        self.decode.use_shares(shares)
        self.prefill.use_shares(shares)
        self.decode.start()

    def _most_decoding(self) -> int:
        return decode_room(self._cores, len(self.decode.lanes), max(self.prefill.shares, default=0.0))
