"""`Pacer`: when the tokens of decode steps go out.

A message costs scheduler, gateway and client the same whether it brings a sequence one token or four, and
where cores are few that cost is taken from the engine. So while many sequences decode together, several steps
share a message. It is done here, where tokens come from, so that everybody on their way is spared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from muxserve.engine.messages import UNFINISHED, TokenLogprobs
from muxserve.worker.orders import DecodeOrder, Ended, Outcome, Tokens

PER_SEQUENCE = 0.007
"""Seconds that each sequence beyond the first adds to the time that a token may wait."""


@dataclass(slots=True)
class Run:
    """Consecutive tokens of one sequence."""

    position: int
    """Of the first one."""
    tokens: list[int]
    finished: int = UNFINISHED
    """How the sequence stands after the last one."""


@dataclass(slots=True)
class Progress:
    """Tokens of one job that go out together."""

    job: int
    steps: int = 0
    """Steps of the job that have ended."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """One per run, of one token each then; or empty."""
    _runs: dict[int, Run] = field(default_factory=dict)
    _added: list[Tokens] = field(default_factory=list)
    """Steps that are not in the runs yet: put together in one go they cost little more than one."""

    def add(self, tokens: Tokens, steps: int) -> None:
        """Another step of the job: its `steps`-th."""
        self.steps = steps
        self._added.append(tokens)

    @property
    def runs(self) -> dict[int, Run]:
        """By sequence."""
        added, self._added = self._added, []
        if len(added) > 1 and not self._runs and all(a.sequences == added[0].sequences for a in added):
            rows = zip(*(a.step.tokens for a in added), strict=True)
            first, last = added[0].step, added[-1].step
            for number, position, row, finished in zip(
                added[0].sequences, first.positions, rows, last.finished, strict=True
            ):
                self._runs[number] = Run(position, list(row), finished)
            return self._runs
        for each in added:
            step = each.step
            for number, position, token, finished in zip(
                each.sequences, step.positions, step.tokens, step.finished, strict=True
            ):
                run = self._runs.setdefault(number, Run(position, []))
                run.tokens.append(token)
                run.finished = finished
        return self._runs

    def take(self, numbers: Iterable[int]) -> Progress:
        """The part of these sequences, which is no longer in this one."""
        part, runs = Progress(self.job, self.steps), self.runs
        part._runs.update((number, runs.pop(number)) for number in numbers if number in runs)
        return part


@dataclass(slots=True)
class _Lease:
    """A decode job that has not ended."""

    order: DecodeOrder
    steps: int = 0
    """Steps that have ended."""

    @property
    def left(self) -> int:
        return self.order.steps - self.steps


class Pacer:
    """The rule: while n sequences decode together, a token waits for those of later steps for at most
    min(longest, (n - 1) * PER_SEQUENCE) seconds, and only if the next step is likely to come within that
    time.

    So the tokens of a lone sequence never wait. Nor do the tokens of a prefill job, those that finish a
    sequence, and log-probabilities. When a step brings the first token of one of its job's prompts, or a job
    ends without another one that follows it, nothing is held back. When `lead` steps of a job are left that
    is told at once, with its tokens or without. Order is kept for each sequence, and a job's end comes after
    all of its tokens.
    """

    def __init__(self, longest: float, send: Callable[[Progress | Ended], None]) -> None:
        """`longest` in seconds; 0: nothing ever waits."""
        self._longest = longest
        self._send = send
        self._leases: dict[int, _Lease] = {}
        """In the order in which they came."""
        self._held: list[Progress | Ended] = []
        self._due = 0.0
        self._last_step = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._deciding = False
        self._lead: Progress | None = None
        """That so many steps of a job have ended, where the scheduler has to hear of it."""
        self._at_once = False
        """Whether what is held must not be."""

    def ordered(self, order: DecodeOrder) -> None:
        """That decode job will run."""
        self._leases[order.job] = _Lease(order)

    def tokens(self, tokens: Tokens) -> None:
        """A step has ended."""
        lease = self._leases.get(tokens.job)
        if lease is None:
            self._send(_of(tokens, steps=1))
            return
        lease.steps += 1
        if tokens.step.logprobs:
            self.flush()
            self._send(_of(tokens, lease.steps))
            return
        self._holding(tokens.job).add(tokens, lease.steps)
        self._at_once |= len(tokens.sequences) == 1
        if lease.steps == 1:
            self._at_once |= not lease.order.prompts.isdisjoint(tokens.sequences)
        if lease.left and lease.left == lease.order.lead:
            self._lead = Progress(tokens.job, lease.steps)
        if any(tokens.step.finished):
            self._let_go(tokens)
        if not self._longest:
            self.flush()
        elif not self._deciding:
            # Steps that the executor has told together are decided on together.
            self._deciding = True
            asyncio.get_running_loop().call_soon(self._decide, len(tokens.sequences))

    def ended(self, ended: Ended) -> None:
        """A job has ended."""
        lease = self._leases.pop(ended.job, None)
        if lease is None:
            self._send(ended)
            return
        self._held.append(ended)
        as_asked = not lease.left and ended.outcome is Outcome.OK and not ended.refused
        followed = any(other.order.model == lease.order.model for other in self._leases.values())
        if not (as_asked and followed):
            self.flush()

    def flush(self) -> None:
        """Hold nothing back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, self._held, self._at_once, self._lead = self._held, [], False, None
        for each in held:
            if isinstance(each, Ended) or each.runs:
                self._send(each)

    def _holding(self, job: int) -> Progress:
        """What is held of a job that runs. Several do, and their steps come by turns."""
        for each in self._held:
            if isinstance(each, Progress) and each.job == job:
                return each
        self._held.append(progress := Progress(job))
        return progress

    def _let_go(self, tokens: Tokens) -> None:
        """Send all that is held of sequences that have finished, also what an earlier job made of it."""
        rows = zip(tokens.sequences, tokens.step.finished, strict=True)
        finished = [number for number, how in rows if how != UNFINISHED]
        for each in self._held:
            if isinstance(each, Progress) and (part := each.take(finished)).runs:
                self._send(part)

    def _decide(self, sequences: int) -> None:
        self._deciding = False
        if not self._held:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        gap, self._last_step = now - self._last_step, now
        if self._timer is None:
            self._due = now + min(self._longest, PER_SEQUENCE * (sequences - 1))
        if self._at_once or now + gap > self._due:
            self.flush()
            return
        if self._lead is not None:
            self._send(self._lead)
            self._lead = None
        if self._timer is None:
            self._timer = loop.call_at(self._due, self.flush)


def _of(tokens: Tokens, steps: int) -> Progress:
    """Of one step alone."""
    progress = Progress(tokens.job, logprobs=tokens.step.logprobs)
    progress.add(tokens, steps)
    return progress
