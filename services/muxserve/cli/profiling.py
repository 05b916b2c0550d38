"""Measures jobs and the service around them, as clients see them.

A prompt of a few tokens takes about a decode step, and what a request with one takes beyond that is the
service's: the time on its way. The time until a prompt has a token is that and its prefill's. Prompts that
are computed together are taken for one of as many tokens: sent together, they would not come together, and be
computed in several jobs. A decode step is the time in which each of `batch` sequences gets a token. Prompts
are drawn, so that none has spans in the prefix cache.

The share 100 has times of jobs alone, 50 those of jobs that run beside one of the other kind: decode steps
while prompts come in all the time, and prompts while sequences decode, at some batches, times what that was
alone at all of them. Where decode jobs of two models run side by side, it has decode steps "together" too.

Two prompts under way at once, one of which always waits for the other, say what passes between two jobs.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from muxserve.cli.profile_traffic import TINY, Traffic
from muxserve.client import AsyncClient
from muxserve.placement.solver.cost import SERVICE

STEP_SECONDS = 1.0
"""Seconds for which steps are counted."""
SIDE_SECONDS = 2.5
"""Seconds for which jobs run beside each other."""
WHOLE, BESIDE = "100", "50"
"""Shares of the mesh that the table tells apart, in percent."""
MOST = 4096
"""Prompt tokens of a cell; larger ones take long, and follow from those below."""
LONE = 15
"""Requests that are sent one after the other to learn what one takes beside its jobs."""
FEEDERS = 3
"""Prompts under way at once meanwhile: one is computed, the others wait."""
QUEUED = 2
"""Prompts under way at once where one waits for the other."""
Grid = dict[str, dict[str, dict[str, float]]]
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure."""

    contexts: Mapping[str, int]
    """Most tokens of each model; what does not fit, or is more than `MOST`, is -1."""
    batches: Sequence[int]
    lengths: Sequence[int]
    repeat: int
    beside: bool = True
    company: Sequence[str] = ()
    """Models that can decode beside those, if they are others. Empty: no two decode at once."""


@dataclass(frozen=True, slots=True)
class Slower:
    """How many times as long jobs take as alone."""

    prefill: float
    """Beside a decode job."""
    decode: float
    """Beside prompts."""
    together: float | None
    """Of decode beside another model's. None: no two decode at once."""


async def measure(address: str, wanted: Wanted) -> Table:
    """The table."""
    table: Table = {}
    cells = [(model, batch) for model in wanted.contexts for batch in wanted.batches]
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=len(cells) * (1 + wanted.beside))
        async with AsyncClient(address) as client:
            bench = Bench(client, wanted)
            way = statistics.median([await bench.way(model) for model in wanted.contexts])
            order = statistics.median([await bench.order(model, way) for model in wanted.contexts])
            for model, batch in cells:
                grids = table.setdefault(model, {"1": {WHOLE: {}}})["1"]
                grids[WHOLE][str(batch)] = await bench.row(model, batch, way)
                bar.advance(task)
            for model in wanted.contexts if wanted.beside else ():
                grids = table[model]["1"]
                grids[BESIDE] = await bench.beside(model, grids[WHOLE], lambda: bar.advance(task))
    return {SERVICE: {"request_seconds": round(way, 6), "order_seconds": round(order, 6)}} | table


class Bench:
    """Measures through a gateway."""

    def __init__(self, client: AsyncClient, wanted: Wanted) -> None:
        self._traffic = Traffic(client, min(wanted.contexts.values()))
        self._wanted = wanted
        self._prefills: dict[tuple[str, int], float] = {}
        """Seconds by model and tokens."""
        self._steps: dict[str, float] = {}
        """Seconds of the latest step that was measured, by model."""

    async def way(self, model: str) -> float:
        """Seconds of a request beside its jobs."""
        await self._traffic.seconds(model, 1, TINY, 2)  # wakes what sleeps
        first = [await self._traffic.seconds(model, 1, TINY, 1) for _ in range(LONE)]
        self._steps[model] = statistics.median([await self._steps_of(model, 1, TINY) for _ in range(3)])
        return max(0.0, statistics.median(first) - self._steps[model])

    async def order(self, model: str, way: float) -> float:
        """Seconds from the end of a prompt to the beginning of one that has waited for it: what lies between
        two ends, less what jobs take."""
        length = max((n for n in self._wanted.lengths if n < self._wanted.contexts[model]), default=TINY)
        took = [await self._traffic.seconds(model, 1, length, 1) for _ in range(LONE)]
        alone = self._prefills[model, length] = max(1e-6, statistics.median(took) - way)
        async with self._traffic.fed(model, length, QUEUED) as prompts:
            await asyncio.sleep(max(SIDE_SECONDS, LONE * alone))
        return max(0.0, prompts.seconds - alone) if prompts.done > 1 else 0.0

    async def row(self, model: str, batch: int, way: float) -> dict[str, dict[str, float]]:
        """Milliseconds by length."""
        found = {}
        for length in self._wanted.lengths:
            prefill = await self._prefill(model, batch * length, way)
            step = await self._step(model, batch, length)
            found[str(length)] = {"prefill": _milliseconds(prefill), "decoding": _milliseconds(step)}
        return found

    async def beside(self, model: str, alone: Grid, advance: Callable[[], None]) -> Grid:
        """The same grid with times of jobs side by side."""
        batches = sorted(self._wanted.batches)
        looked = {batches[0], batches[len(batches) // 2], batches[-1]}
        known = [n for n in sorted(self._wanted.lengths) if alone[str(batches[0])][str(n)]["decoding"] > 0]
        factors: dict[int, Slower] = {}
        for batch in batches:
            if batch in looked and known:
                step = alone[str(batch)][str(known[0])]["decoding"] / 1e3
                factors[batch] = await self._slower(model, batch, known[-1], step)
            advance()
        if not factors:
            return alone
        prefill = statistics.median(each.prefill for each in factors.values())
        decode = {batch: each.decode for batch, each in factors.items()}
        together = {b: each.together for b, each in factors.items() if each.together is not None}
        grid: Grid = {}
        for batch in batches:
            row = grid[str(batch)] = {}
            for length, cell in alone[str(batch)].items():
                step = cell["decoding"]
                row[length] = {
                    "prefill": _scaled(cell["prefill"], prefill),
                    "decoding": _scaled(step, _between(batch, decode)),
                }
                if together:
                    row[length]["together"] = _scaled(step, _between(batch, together))
        return grid

    async def _prefill(self, model: str, tokens: int, way: float) -> float | None:
        """Seconds of a prompt. None: it is too long."""
        if tokens >= self._wanted.contexts[model] or tokens > MOST:
            return None
        if (model, tokens) not in self._prefills:
            took = [await self._traffic.seconds(model, 1, tokens, 1) for _ in range(self._wanted.repeat)]
            self._prefills[model, tokens] = max(1e-6, statistics.median(took) - way)
        return self._prefills[model, tokens]

    async def _step(self, model: str, batch: int, length: int) -> float | None:
        """Seconds of a decode step. None: the sequences do not fit."""
        if batch * length > MOST or length + 2 > self._wanted.contexts[model]:
            return None
        took = [await self._steps_of(model, batch, length) for _ in range(self._wanted.repeat)]
        self._steps[model] = statistics.median(took)
        return self._steps[model]

    async def _steps_of(self, model: str, batch: int, length: int) -> float:
        """The same, once. Sequences whose prompts come first go on while the others' are computed."""
        known = [seconds for (name, _), seconds in self._prefills.items() if name == model]
        pace = max(known, default=0.0) / max((n for name, n in self._prefills if name == model), default=1)
        step = self._steps.get(model, 1e-3)
        steps = math.ceil((2 * STEP_SECONDS + 3 * batch * length * pace) / step)
        async with self._traffic.decoding({model: batch}, steps, length) as streams:
            return await streams.step(model, STEP_SECONDS)

    async def _slower(self, model: str, batch: int, length: int, step: float) -> Slower:
        """Of prompts of `length` and steps of `batch`. `step`: seconds of one alone."""
        steps = math.ceil(2 * SIDE_SECONDS / step)
        traffic = self._traffic
        async with (
            traffic.decoding({model: batch}, steps) as streams,
            traffic.fed(model, length, FEEDERS) as beside,
        ):
            decode = await streams.step(model, SIDE_SECONDS) / step
        async with traffic.fed(model, length, FEEDERS) as alone:
            await asyncio.sleep(SIDE_SECONDS)
        prefill = beside.seconds / alone.seconds if alone.done > 1 and beside.done > 1 else 1.0
        together = None
        if other := next((name for name in self._wanted.company if name != model), None):
            async with traffic.decoding({model: batch, other: batch}, steps) as streams:
                together = max(1.0, await streams.step(model, SIDE_SECONDS) / step)
        return Slower(max(1.0, prefill), max(1.0, decode), together)


def _milliseconds(seconds: float | None) -> float:
    return -1.0 if seconds is None else round(1e3 * seconds, 4)


def _scaled(milliseconds: float, factor: float) -> float:
    return round(milliseconds * factor, 4) if milliseconds > 0 else milliseconds


def _between(batch: int, factors: Mapping[int, float]) -> float:
    """The factor of steps at a batch, by those of the nearest batches that were looked at."""
    known = sorted(factors)
    low = max((b for b in known if b <= batch), default=known[0])
    high = min((b for b in known if b >= batch), default=known[-1])
    if low == high:
        return factors[low]
    part = (batch - low) / (high - low)
    return factors[low] + part * (factors[high] - factors[low])
