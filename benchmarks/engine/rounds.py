"""Rounds: every cell by every contender in turn, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.engine.contender import Contender
from benchmarks.engine.machine import Others
from benchmarks.engine.peers.wire import Timing
from benchmarks.engine.plan import Cell, Plan

CALM = 0.1
"""Cores that other programs may use for a measurement to count as undisturbed."""

HOPELESS = 1.3
"""A peer's variant that loses a cell to another one of the same peer by this factor in the first round sits
the others out: only the better one's speed is of interest."""

WAKING = 32
"""Tokens of the prompt that is not measured before each one that is."""

WARM_UP = Cell("decode", 8, 64, 4)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request to one contender. Seconds; tokens per second where `_rate`."""

    contender: str
    cell: Cell
    round: int
    seconds: float
    first_s: float
    decode_rate: float
    """Of tokens after the last prompt's first token; 0 if there are none."""
    prefill_rate: float
    """Of prompt tokens, until the last prompt's first token; 0 where KV was filled in."""
    total_rate: float
    """Of generated tokens, prefill included."""
    others_cores: float
    """Cores that other programs used meanwhile."""
    agreement: float
    """Part of the prompts whose first token is the same as ours; 1 for ours."""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """What its cell is for."""
        return self.decode_rate if self.cell.kind == "decode" else self.prefill_rate

    @property
    def calm(self) -> bool:
        return self.others_cores <= CALM


def measure(contender: Contender, cell: Cell, prompts: list[list[int]]) -> tuple[Timing, float]:
    """One request, and the cores that others used meanwhile. Raises ContenderFailed."""
    # Wakes it after a pause. Other tokens than those that are measured: nobody is to remember them.
    contender.generate([prompts[0][: -WAKING - 1 : -1]], 2)
    others = Others(contender.pids)
    timing = contender.generate(prompts, cell.new, **({"filled": True} if cell.filled else {}))
    return timing, others.cores()


class Rounds:
    """Runs them. The first contender is ours; `families` says which contenders are variants of one peer.

    advance: called with what is next, for each measurement, and with "" for one that is left out.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        families: dict[str, str],
        vocabulary: int,
        retries: int,
        advance: Callable[[str], None],
    ) -> None:
        self._contenders = contenders
        self._families = families
        self._vocabulary = vocabulary
        self._retries = retries
        self._advance = advance
        self.done: list[Measurement] = []

    def warm_up(self) -> None:
        """Have each do a little of everything."""
        prompts = WARM_UP.prompts(self._vocabulary, seed=-1)
        for contender in self._contenders:
            contender.generate(prompts[:1], WARM_UP.new)
            contender.generate(prompts, WARM_UP.new)

    def run(self, plan: Plan, deadline: float) -> None:
        """As many rounds as the plan and its time allow; no round is begun, but for the first, that would not
        end before `deadline` (perf_counter), nor any cell after it."""
        for number in range(plan.rounds):
            if number and time.perf_counter() + self._estimate(number, plan.cells) > deadline:
                return
            self.round(number, plan.cells, deadline)

    def round(self, number: int, cells: Iterable[Cell], deadline: float = math.inf) -> None:
        """One round."""
        for place, cell in enumerate(cells):
            if time.perf_counter() > deadline:
                return
            prompts = cell.prompts(self._vocabulary, seed=(number, place))
            first: list[int] = []
            for contender in self._contenders:
                if not self._takes_part(contender, cell, number):
                    self._advance("")
                    continue
                self._advance(f"{contender.name}: {cell.name}")
                for _ in range(cell.times):
                    self._try(contender, cell, number, prompts, first)

    def _try(
        self, contender: Contender, cell: Cell, number: int, prompts: list[list[int]], first: list[int]
    ) -> None:
        """Measure, again if others used the cores meanwhile. `first`: our first tokens, put in if empty."""
        for _ in range(1 + self._retries):
            timing, others = measure(contender, cell, prompts)
            first[:] = first or [ids[0] for ids in timing.tokens]
            self.done.append(_measurement(contender.name, cell, number, timing, others, first))
            if self.done[-1].calm:
                return

    def _estimate(self, number: int, cells: Iterable[Cell]) -> float:
        """Seconds that a round will take, going by what was measured."""
        pairs = itertools.product(cells, self._contenders)
        found = (chosen(self.done, c.name, cell) for cell, c in pairs if self._takes_part(c, cell, number))
        times = (
            (each[0].cell.times, statistics.median(one.seconds for one in each)) for each in found if each
        )
        return sum(count * seconds for count, seconds in times)

    def _takes_part(self, contender: Contender, cell: Cell, number: int) -> bool:
        family = self._families.get(contender.name)
        if family is None:
            return True
        if not cell.peers:
            return False
        rates = {
            name: rate(self.done, name, cell) for name, other in self._families.items() if other == family
        }
        return number == 0 or max(rates.values()) < HOPELESS * rates[contender.name]


def _measurement(
    name: str, cell: Cell, number: int, timing: Timing, others: float, first: list[int]
) -> Measurement:
    same = [ids[0] == token for ids, token in zip(timing.tokens, first, strict=True)]
    return Measurement(
        contender=name,
        cell=cell,
        round=number,
        seconds=timing.seconds,
        first_s=timing.first_s,
        decode_rate=timing.decode_tokens / timing.decode_s if timing.decode_tokens else 0.0,
        prefill_rate=0.0 if cell.filled else cell.batch * cell.context / timing.first_s,
        total_rate=cell.batch * cell.new / timing.seconds,
        others_cores=others,
        agreement=statistics.fmean(same),
        parts=timing.parts,
    )


def chosen(done: Iterable[Measurement], contender: str, cell: Cell) -> list[Measurement]:
    """The undisturbed measurements of that cell; all, if none is."""
    found = [one for one in done if one.contender == contender and one.cell == cell]
    return [one for one in found if one.calm] or found


def rate(done: Iterable[Measurement], contender: str, cell: Cell) -> float:
    """Median of the cell's rate; 0 if it was not measured."""
    return statistics.median([one.rate for one in chosen(done, contender, cell)] or [0.0])


def best(done: Sequence[Measurement], contenders: Iterable[str], cell: Cell) -> float:
    """The best contender's rate; 0 if none was measured."""
    return max((rate(done, name, cell) for name in contenders), default=0.0)


def as_json(done: Iterable[Measurement]) -> list[dict[str, object]]:
    """For raw results."""
    return [asdict(one) for one in done]
