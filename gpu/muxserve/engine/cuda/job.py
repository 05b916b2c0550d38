"""`CudaJob`: a job between the thread that runs it and the one that asks how it does."""

from __future__ import annotations

import time
from collections import deque

from muxserve.engine.messages import DecodeJob, PrefillJob, Shares, Step


class CudaJob:
    """Implements `RunningJob`. Fields are written by one thread each, and read by the other."""

    def __init__(self, message: PrefillJob | DecodeJob) -> None:
        self.message = message
        self.number = message.job
        self.model = message.model
        self.shares = message.shares
        self.stopped = False
        self.steps = 0
        self.seconds = 0.0
        self.error: Exception | None = None
        self.ended = False
        self.nears_end = False
        """Stays so: kernels are launched long before they run, and how far they are is not known."""
        self._delivered: deque[Step] = deque()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """See `RunningJob.stop`."""
        self.stopped = True

    def use_shares(self, shares: Shares) -> None:
        """See `RunningJob.use_shares`."""
        self.shares = shares

    def collect(self) -> list[Step]:
        """See `RunningJob.collect`."""
        return [self._delivered.popleft() for _ in range(len(self._delivered))]

    def deliver(self, step: Step) -> None:
        """By the thread that runs it: a step's tokens, once they are in the token table."""
        self._delivered.append(step)

    def end(self, error: Exception | None) -> None:
        """By the thread that runs it, when nothing of the job is left on the device."""
        self.error = error
        self.seconds = time.perf_counter() - self._started
        self.ended = True
