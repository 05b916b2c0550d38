"""`Slip`: how much longer models wait from one token to the next than was expected.

What is expected follows from fitted latencies. Besides steps there is what nobody fitted: turns of other
models, leases that end early, orders on their way. It is seen over a second at a time, per model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache

from muxserve.scheduler.policy.interface import ModelSnapshot

WINDOW = 1.0
"""Seconds over which it is looked at."""
NEWEST = 0.3
"""Weight of the newest window."""
LEAST, MOST = 0.8, 3.0
FADES = 1.0
"""Seconds in which half of what was learned is forgotten while nothing decodes: who made it wait is gone."""
NONE = 0.01
"""What is no slip any more."""


@dataclass(slots=True)
class _Window:
    since: float
    expected: float
    """Seconds per step, at its beginning."""
    steps: int = 0


class Slip:
    """Factors by model."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}
        """Of models that have decoded all the time since."""
        self._factors: dict[str, float] = {}
        self._seen = 0.0

    def of(self, model: str) -> float:
        """What the model's expected seconds per step are to be multiplied by."""
        return self._factors.get(model, 1.0)

    def of_all(self, sequences: Mapping[str, int]) -> float:
        """The mean of so many sequences by model."""
        count = sum(sequences.values())
        return sum(self.of(name) * n for name, n in sequences.items()) / count if count else 1.0

    def stepped(self, model: str, steps: int) -> None:
        """It has decoded so many steps."""
        if (window := self._windows.get(model)) is not None:
            window.steps += steps

    def look(self, models: Collection[ModelSnapshot], now: float, expected: Callable[[], float]) -> None:
        """See who decodes; `expected`: seconds between two steps of each, as things are. It is asked once at
        most, as most windows end with the same look."""
        expected = cache(expected)
        self._rest(now, any(m.running for m in models))
        for m in models:
            window = self._windows.get(m.model)
            if not m.running:
                self._windows.pop(m.model, None)
            elif window is None:
                self._windows[m.model] = _Window(now, expected())
            elif (elapsed := now - window.since) >= WINDOW:
                seconds = expected()
                usual = window.steps * (seconds + window.expected) / 2
                seen = min(MOST, max(LEAST, elapsed / usual)) if usual > 0 else MOST
                before = self.of(m.model)
                self._factors[m.model] = before + NEWEST * (seen - before)
                self._windows[m.model] = _Window(now, seconds)

    def _rest(self, now: float, decoding: bool) -> None:
        """Forget, if nothing decodes."""
        if not decoding and self._factors:
            kept = 0.5 ** ((now - self._seen) / FADES)
            more = {name: factor - 1 for name, factor in self._factors.items()}
            self._factors = {name: 1 + extra * kept for name, extra in more.items() if abs(extra) > NONE}
        self._seen = now
