"""`Line`: least squares of y over x, where older observations count less."""

from __future__ import annotations

from collections.abc import Iterable

FORGET = 0.99
"""Weight that an observation keeps with each one that follows."""

Point = tuple[float, float]


class Line:
    """Through what was observed."""

    def __init__(self, points: Iterable[Point], lasting: float = 0.0) -> None:
        """`points`, with at least two different x: what is assumed before anything is known. It is forgotten
        as observations are; or it is not, and each point has the weight `lasting`."""
        sums = tuple(map(sum, zip(*(_terms(x, y) for x, y in points), strict=True)))
        self._sums = tuple(0.0 * s for s in sums) if lasting else sums
        """Of 1, x, x², y and x · y."""
        self._lasting = tuple(lasting * s for s in sums)

    def observe(self, x: float, y: float) -> None:
        """It was y there."""
        self._sums = tuple(FORGET * s + t for s, t in zip(self._sums, _terms(x, y), strict=True))

    @property
    def variance(self) -> float:
        """Of x."""
        n, x, xx, _, _ = self._all()
        return (n * xx - x * x) / (n * n)

    @property
    def slope(self) -> float:
        """What one more of x adds to y."""
        n, x, xx, y, xy = self._all()
        return (n * xy - x * y) / (n * xx - x * x)

    def start(self, slope: float) -> float:
        """Where x is 0, of the line with that slope through the middle of what was observed."""
        n, x, _, y, _ = self._all()
        return (y - slope * x) / n

    def _all(self) -> tuple[float, ...]:
        return tuple(s + p for s, p in zip(self._sums, self._lasting, strict=True))


def _terms(x: float, y: float) -> tuple[float, ...]:
    return 1.0, x, x * x, y, x * y
