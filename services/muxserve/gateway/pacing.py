"""`Pacer`: when clients are told of tokens.

A message costs gateway and client the same whether it brings one token or four, and where cores are few the
engine pays for it. Workers let tokens wait for those of later steps, but only until a job ends, and where
models take turns jobs are short. So while many requests are in flight here, tokens wait once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PER_REQUEST = 0.004
"""Seconds that each request in flight beyond the first adds to the time that tokens may wait."""


class Pacer:
    """The rule: while n requests are in flight, tokens wait for at most min(longest, (n - 1) * PER_REQUEST)
    seconds. All that wait go out together."""

    def __init__(self, longest: float) -> None:
        """`longest` in seconds; 0: nothing ever waits."""
        self._longest = longest
        self._held: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, tell: Callable[[], None], in_flight: int) -> None:
        """Call `tell` in time. A second call of it does no harm."""
        if (wait := min(self._longest, PER_REQUEST * (in_flight - 1))) <= 0:
            tell()
            return
        self._held.append(tell)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._flush)

    def _flush(self) -> None:
        held, self._held, self._timer = self._held, [], None
        for tell in held:
            tell()
