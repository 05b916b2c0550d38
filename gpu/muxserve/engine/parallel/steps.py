"""Which steps of a decode job run, the same on every rank: else one would wait for another for ever.

That a sequence finishes, all ranks see in the tokens. That the worker ends the lease early, rank 0 alone
hears, while the others may be a step ahead. So the others run only what rank 0 has granted. Rank 0 grants the
step after its own, that none has to wait, and keeps to what it has granted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec

AHEAD = 2
"""Steps granted from the one that rank 0 begins on: at most so many run when a lease is ended."""


class Advance(msgspec.Struct, frozen=True, tag=True):
    """From rank 0: that job may run `steps` steps in all; `last`: and no more will be granted."""

    job: int
    steps: int
    last: bool = False


class Steps:
    """A follower's: an iterator over the steps that run, which waits for each to be granted."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._granted = 0
        self._last = False
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[int]:
        """For one thread: 0, 1, … as each may begin."""
        for step in range(self._total):
            if not self._may_run(step):
                return
            yield step

    def grant(self, advance: Advance) -> None:
        """By any thread."""
        with self._changed:
            self._granted, self._last = advance.steps, advance.last
            self._changed.notify_all()

    def _may_run(self, step: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: step < self._granted or self._last)
            return step < self._granted


class LeadingSteps(Steps):
    """Rank 0's: never waits, and tells the others (`Leader.tell`)."""

    def __init__(self, job: int, total: int, tell: Callable[[Advance], None]) -> None:
        super().__init__(total)
        self._job = job
        self._tell = tell

    def stop(self) -> None:
        """End the job with the steps that are granted; by any thread. Raises what `tell` raises."""
        with self._changed:
            if not self._last:
                self._last = True
                self._tell(Advance(self._job, self._granted, last=True))

    def _may_run(self, step: int) -> bool:
        with self._changed:
            if not self._last:
                self._granted = min(step + AHEAD, self._total)
                self._last = self._granted == self._total
                self._tell(Advance(self._job, self._granted, self._last))
            return step < self._granted
