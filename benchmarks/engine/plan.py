"""`Plan`: what is measured. Values only."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill"]

FIRST_ID = 16
"""Ids below are control tokens in the vocabularies that are measured."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`batch` prompts of `context` tokens each, handed over at once; `new` tokens generated of each.

    decode: what comes after the last prompt's first token is measured. prefill: `new` is 1, and all of it is.
    """

    kind: Kind
    batch: int
    context: int
    new: int
    peers: bool = True
    """Peers run it too; else ours alone."""
    times: int = 1
    """How often a round measures it."""

    @property
    def name(self) -> str:
        """For people, and to find it again in the raw results."""
        return f"{self.kind} {self.batch} x {self.context}"

    @property
    def filled(self) -> bool:
        """Begin with KV of random numbers instead of the prompts': what decode costs does not depend on it,
        and computing it would take most of the time. Ours alone is measured like that."""
        return self.kind == "decode" and not self.peers

    def prompts(self, vocabulary: int, seed: object) -> list[list[int]]:
        """Distinct prompts of random ids; the same for the same seed."""
        source = random.Random(f"{seed} {self.name}")
        ids = range(FIRST_ID, vocabulary)
        return [source.choices(ids, k=self.context) for _ in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells, each measured once a round by every contender in turn."""

    cells: tuple[Cell, ...]
    rounds: int
    seconds: float
    """After the start, later than which no round is begun that would not have ended by then."""
    retries: int
    """How often a measurement is repeated because other programs used the cores meanwhile."""
    services_seconds: float = 0.0
    """Of those, what is kept for the services, if they are asked for."""
    streams: tuple[int, ...] = (1, 32)
    """Through the services: how many at once."""
    stream_prompt: int = 64
    """Tokens of each stream's prompt."""
    stream_tokens: int = 256
    """Generated of each stream: many, as streams do not begin together and only counts while all decode."""
    stream_rounds: int = 3
    lone_requests: int = 10
    """A round, to see the time to the first token."""

    @property
    def context(self) -> int:
        """Longest sequence."""
        longest = max(cell.context + cell.new for cell in self.cells)
        return max(longest, self.stream_prompt + self.stream_tokens)

    @property
    def peer_context(self) -> int:
        """Longest sequence that peers see."""
        return max(cell.context + cell.new for cell in self.cells if cell.peers)

    @property
    def peer_tokens(self) -> int:
        """Most KV that peers hold at once, in tokens."""
        return max(cell.batch * (cell.context + cell.new) for cell in self.cells if cell.peers)

    @property
    def tokens(self) -> int:
        """Most KV that is held at once, in tokens."""
        return max(cell.batch * (cell.context + cell.new) for cell in self.cells)

    @property
    def stream_cells(self) -> tuple[Cell, ...]:
        """Streams through the services, each a prompt."""
        return tuple(Cell("decode", n, self.stream_prompt, self.stream_tokens) for n in self.streams)

    @property
    def lone(self) -> Cell:
        """The request whose first token is timed."""
        return Cell("prefill", 1, self.stream_prompt, 1)

    @property
    def slots(self) -> int:
        """Most sequences at once."""
        return max(cell.batch for cell in self.cells)


ATTENTION = Cell("decode", 16, 4096, 16, peers=False, times=3)
"""Where reading KV takes longest: what attention makes of the memory's bandwidth. That is the fastest of many
copies, so this has more than one chance too."""

ATTENTION_BASE = Cell("decode", 16, 128, 16, peers=False)
"""The same step with next to no KV: what is left of ATTENTION's without it is attention."""


def quick() -> Plan:
    """Ends within five minutes on two cores, two peers included. See `--help` for what it leaves out."""
    decode = (Cell("decode", batch, 128, 64 if batch < 32 else 32) for batch in (1, 8, 32, 64))
    cells = (*decode, Cell("prefill", 8, 512, 1), ATTENTION_BASE, ATTENTION)
    return Plan(
        cells, rounds=3, seconds=275.0, services_seconds=65.0, retries=0, stream_tokens=192, stream_rounds=2
    )


def full() -> Plan:
    """Everything."""
    batches = (1, 8, 32, 64)
    cells = [Cell("decode", batch, 128, 64) for batch in batches]
    cells += [Cell("decode", batch, 1024, 64) for batch in batches]
    # A peer would need minutes to read 64 prompts of 4,096 tokens: it gets the small batches.
    cells += [Cell("decode", batch, 4096, 64, peers=batch <= 8) for batch in batches]
    cells += [Cell("prefill", 8, length, 1) for length in (128, 512, 2048)]
    cells += [Cell("prefill", 1, length, 1) for length in (128, 512, 2048)]
    return Plan((*cells, ATTENTION_BASE, ATTENTION), rounds=3, seconds=math.inf, retries=2)
