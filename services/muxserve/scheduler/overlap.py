"""`Overlap`: which part of its time a job had other jobs beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

Kind = Literal["prefill", "decode"]
KEPT = 32
"""Ended jobs of a kind that are remembered: more do not fit beside one of the other."""


class Overlap:
    """Jobs of one kind and model run one after the other; when they ran follows from their ends."""

    def __init__(self) -> None:
        self._spans: dict[Kind, deque[tuple[float, float, str]]] = {
            "prefill": deque(maxlen=KEPT),
            "decode": deque(maxlen=KEPT),
        }
        """Start, end and model of jobs that ended."""

    def ended(
        self, kind: Kind, model: str, now: float, seconds: float, running: Iterable[tuple[Kind, str, float]]
    ) -> tuple[float, float]:
        """A job ended now, after so many seconds: the parts of them, 0 to 1, in which a job of the other
        kind, and one of its own kind and another model, ran too.

        running: kind, model and time of sending of each job that has not ended.
        """
        start = now - seconds
        spans = [(k, *span) for k, ended in self._spans.items() for span in ended]
        ends = {(k, m): end for k, _, end, m in spans}
        # One that was sent before another of its model had ended began after that.
        spans += [(k, max(sent, ends.get((k, m), 0.0)), now, m) for k, m, sent in running]
        self._spans[kind].append((start, now, model))
        if seconds <= 0:
            return 0.0, 0.0
        other = covered(((a, b) for k, a, b, _ in spans if k != kind), start, now)
        own = covered(((a, b) for k, a, b, m in spans if k == kind and m != model), start, now)
        return other / seconds, own / seconds


def covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Seconds between start and end that lie in any of these."""
    total, reached = 0.0, start
    for begin, stop in sorted(spans):
        begin, stop = max(begin, reached), min(stop, end)
        if stop > begin:
            total += stop - begin
            reached = stop
    return total
