"""`Hindsight`: how estimates of what requests take came true.

Whoever estimates from what goes on at the moment expects a crowded moment to last; but most of those who
make it crowded are gone before the request is. So a line is fitted from estimated to actual seconds, both as
multiples of what the request takes alone (least squares; older ones count less). At first, and where requests
are too much alike to tell, estimates are taken as they are. Nothing is concluded for a crowd larger than any
of late: beyond those the line goes on as estimates do.
"""

from __future__ import annotations

from muxserve.scheduler.policy.line import Line

PRIOR = 5.0
"""Weight of each of two outcomes that were as estimated, ..."""
PRIOR_AT = (1.0, 8.0)
"""... one alone and one in a crowd."""
STEEPEST = 1.5
"""Of the line."""
RECEDES = 0.998
"""What remains of the farthest estimate with each outcome that follows."""
MOST = 30.0
"""Multiples beyond which something else went on."""


class Hindsight:
    """The line."""

    def __init__(self) -> None:
        self._line = Line([(each, each) for each in PRIOR_AT], lasting=PRIOR)
        self._start, self._slope = 0.0, 1.0
        self._farthest = 1.0

    def observe(self, estimated: float, actual: float) -> None:
        """What was to take `estimated` times as long as alone took `actual` times as long."""
        estimated = min(MOST, estimated)
        self._farthest = max(estimated, RECEDES * self._farthest)
        self._line.observe(estimated, min(MOST, actual))
        self._slope = min(STEEPEST, max(0.0, self._line.slope))
        self._start = self._line.start(self._slope)

    def __call__(self, estimated: float) -> float:
        """What an estimate means, in multiples of what it takes alone; at least 1."""
        near = min(estimated, self._farthest)
        return max(1.0, self._start + self._slope * near + estimated - near)
