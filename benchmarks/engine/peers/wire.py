"""How a contender is asked: JSON lines on its standard input, one JSON line on its standard output for each.

A contender is a process that keeps a model in memory. Its first line says that it is ready:
`{"start_s": …, …}`, with whatever it has to say about itself. Then each request
`{"prompts": [[id, …], …], "new": n}`, with `"filled": true` for ours where KV need not be the prompts' own,
is answered by a `Timing` as JSON, or by `{"error": "…"}`. End of input ends it. Python's standard library
alone, since peers run in interpreters of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Prompts = list[list[int]]


@dataclass
class Timing:
    """One request: all prompts handed over at once, `new` tokens generated of each, greedily, to full length.

    Decode is counted while all prompts decode: from the moment at which the *last* one has its first token,
    so that no prefill is in it, to that at which the *first* one is complete. `decode_tokens` are the tokens
    that came in between, in `decode_s` seconds.
    """

    seconds: float
    """From handing over to the last token."""
    first_s: float
    """From handing over to the last prompt's first token."""
    decode_tokens: int
    decode_s: float
    tokens: list[list[int]]
    """What was generated, by prompt."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of decode by what was done, from contenders that can tell."""


class Stopwatch:
    """Counts tokens of one request as they come; made when the prompts are handed over."""

    def __init__(self, prompts: int) -> None:
        self._begun = self._first = self._last = time.perf_counter()
        self._tokens: list[list[int]] = [[] for _ in range(prompts)]
        self._waiting = prompts
        self._decoded: list[tuple[float, int, int]] = []
        """Since all decode: when, how many tokens, of the prompt that then has most how many."""

    def arrived(self, tokens: list[tuple[int, list[int]]]) -> None:
        """Tokens that came together: (prompt, ids) each."""
        self._last = time.perf_counter()
        decoding = not self._waiting
        for prompt, ids in tokens:
            if ids and not self._tokens[prompt]:
                self._waiting -= 1
            self._tokens[prompt] += ids
        if decoding:
            longest = max((len(self._tokens[prompt]) for prompt, _ in tokens), default=0)
            self._decoded.append((self._last, sum(len(ids) for _, ids in tokens), longest))
        elif not self._waiting:
            self._first = self._last

    def timing(self, new: int) -> Timing:
        """Of all that came. Raises ValueError unless that is `new` tokens of each prompt."""
        if any(len(ids) != new for ids in self._tokens):
            raise ValueError(f"{[len(ids) for ids in self._tokens]} tokens instead of {new} each")
        # Tokens that come with a prompt's last one were made while all decoded.
        complete = next((when for when, _, longest in self._decoded if longest == new), self._first)
        return Timing(
            seconds=self._last - self._begun,
            first_s=self._first - self._begun,
            decode_tokens=sum(count for when, count, _ in self._decoded if when <= complete),
            decode_s=complete - self._first,
            tokens=self._tokens,
        )


Generate = Callable[..., Timing]
"""Of a request's fields by name: how it went."""


def _die_with_parent() -> None:
    """Linux: be killed when the benchmark is gone, even while stopped, so that nothing is left of it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:  # it was gone before
        os._exit(1)


def serve(start: Callable[[], tuple[Generate, dict[str, Any]]]) -> None:
    """Answer requests until the input ends. `start` loads and returns (how to answer, about itself)."""
    _die_with_parent()
    # What libraries print must not come between the answers: they get standard error for standard output.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    begun = time.perf_counter()
    generate, about = start()
    out.write(json.dumps({"start_s": time.perf_counter() - begun, **about}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = asdict(generate(**request))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
