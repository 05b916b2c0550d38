"""`Overlap`: which part of its time a job had a job of the other kind beside it."""

from __future__ import annotations

from collections import deque
from typing import Literal

Kind = Literal["prefill", "decode"]
KEPT = 16
"""Ended jobs of a kind that are remembered: more do not fit beside one of the other."""


class Overlap:
    """Jobs of one kind run one after the other; when they ran follows from their ends."""

    def __init__(self) -> None:
        self._spans: dict[Kind, deque[tuple[float, float]]] = {
            "prefill": deque(maxlen=KEPT),
            "decode": deque(maxlen=KEPT),
        }
        """Start and end of jobs that ended."""

    def ended(self, kind: Kind, now: float, seconds: float, running_since: float | None) -> float:
        """A job of that kind ended now, after so many seconds; the part of them, 0 to 1.

        `running_since`: when the job of the other kind that runs now was sent. None: none runs.
        """
        start = now - seconds
        others = self._spans["decode" if kind == "prefill" else "prefill"]
        shared = sum(max(0.0, min(now, end) - max(start, begin)) for begin, end in others)
        if running_since is not None:
            begin = max(running_since, others[-1][1]) if others else running_since
            shared += max(0.0, now - max(start, begin))
        self._spans[kind].append((start, now))
        return min(1.0, shared / seconds) if seconds > 0 else 0.0
