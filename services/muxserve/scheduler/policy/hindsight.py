"""`Hindsight`: how estimates of what requests take came true.

Whoever estimates from what goes on at the moment expects a crowded moment to last; but most of those who
make it crowded are gone before the request is. So a line is fitted from estimated to actual seconds, both as
multiples of what the request takes alone (least squares; older ones count less). At first, and where requests
are too much alike to tell, estimates are taken as they are. Nothing is concluded for a crowd larger than any
of late: beyond those the line goes on as estimates do.
"""

from __future__ import annotations

FORGET = 0.99
"""Weight that an outcome keeps with each one that follows."""
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

_PRIOR = tuple(PRIOR * sum(each) for each in zip(*((1.0, x, x * x, x, x * x) for x in PRIOR_AT), strict=True))


class Hindsight:
    """The line."""

    def __init__(self) -> None:
        self._sums: tuple[float, ...] = (0.0,) * 5
        """Of 1, x, x², y and x · y; x: estimated, y: actual."""
        self._start, self._slope = 0.0, 1.0
        self._farthest = 1.0

    def observe(self, estimated: float, actual: float) -> None:
        """What was to take `estimated` times as long as alone took `actual` times as long."""
        x, y = min(MOST, estimated), min(MOST, actual)
        self._farthest = max(x, RECEDES * self._farthest)
        new = 1.0, x, x * x, y, x * y
        self._sums = tuple(FORGET * s + v for s, v in zip(self._sums, new, strict=True))
        n, x, xx, y, xy = (s + p for s, p in zip(self._sums, _PRIOR, strict=True))
        self._slope = min(STEEPEST, max(0.0, (n * xy - x * y) / (n * xx - x * x)))
        self._start = (y - self._slope * x) / n

    def __call__(self, estimated: float) -> float:
        """What an estimate means, in multiples of what it takes alone; at least 1."""
        near = min(estimated, self._farthest)
        return max(1.0, self._start + self._slope * near + estimated - near)
