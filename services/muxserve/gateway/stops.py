"""Finds stop strings in a text that comes in pieces (Aho and Corasick, CACM 18(6), 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """What became certain with a piece of text."""

    text: str
    """Text that is part of no stop string. Ends before the stop string if one was found."""
    stop: str | None = None
    """The stop string that was found: the text ends here."""


class StopMatcher:
    """Looks for the stop string that is complete first; of two that end together, the longer one.

    The longest end of the text that may begin a stop string is held back. What it finds does not depend on
    how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""

    def push(self, text: str) -> Scan:
        """Scan the next piece. After a stop string was found, nothing may be pushed."""
        if len(self._next) == 1:
            return Scan(text)
        state, following, fail = self._state, self._next, self._fail
        for index, character in enumerate(text):
            while state and character not in following[state]:
                state = fail[state]
            state = following[state].get(character, 0)
            stop = self._found[state]
            if stop is not None:
                seen = self._held + text[: index + 1]
                self._held = ""
                return Scan(seen[: len(seen) - len(stop)], stop)
        self._state = state
        seen = self._held + text
        certain = len(seen) - self._depth[state]
        self._held = seen[certain:]
        return Scan(seen[:certain])

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
            state = self._next[state][character]
        self._found[state] = stop

    def _link(self) -> None:
        """Set, breadth first, where each state goes on when no character fits."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                queue.append(child)
                fail = self._fail[state]
                while fail and character not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(character, 0)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
