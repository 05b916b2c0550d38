"""Measures jobs and the service around them, as clients see them.

A prompt of a few tokens takes about a decode step, and what a request with one takes beyond that is the
service's: the time on its way, on an idle device. The time until a prompt has a token is that and its
prefill's. Who carries requests may have to wait for cores that jobs run on: the table has the time on the way
while all lanes decode. Prompts that are computed together are taken for one of as many tokens: sent together,
they would not come together, and be computed in several jobs. A decode step is the time in which each of
`batch` sequences gets a token. Prompts are drawn, so that none has spans in the prefix cache.

The share 100 has times of jobs alone, 50 those of jobs that run beside one of the other kind: decode steps
while prompts come in all the time, and prompts while sequences decode, at some batches, times what that was
alone at all of them. Where decode jobs of two models run side by side, it has decode steps "together" too.

Two prompts under way at once, one of which always waits for the other, say what passes between two jobs while
sequences decode.
Where more models decode than run side by side, lanes go from lease to lease: the time in which they do
nothing then is what leases take beside their steps.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from muxserve.cli.profile_traffic import TINY, Meter, Pace, Spent, Traffic
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
PROMPTS = 25
"""Prompts of each length: their times spread by a fifth."""
BESIDE_COUNTS = 0.5
"""Part of a prefill job's time beside decode jobs that counts as the device's."""
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
    """Models that can decode beside those, if they are others."""
    lanes: int = 1
    """Decode jobs that run side by side."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Jobs side by side."""

    prefill: float
    """How many times as long prompts take beside a decode job."""
    decode: Pace
    """Beside prompts."""
    together: Pace | None
    """Beside another model's. None: no two decode at once."""


async def _nobody() -> Spent:
    return Spent()


async def measure(address: str, wanted: Wanted, meter: Meter = _nobody) -> Table:
    """The table. Where there is no `meter`, steps are with what leases take beside them."""
    table: Table = {}
    cells = [(model, batch) for model in wanted.contexts for batch in wanted.batches]
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=len(cells) * (1 + wanted.beside))
        async with AsyncClient(address) as client:
            bench = Bench(client, wanted, meter)
            way = statistics.median([await bench.way(model) for model in wanted.contexts])
            for model in wanted.contexts:
                await bench.prompts(model, way)
            busy = statistics.median([await bench.busy_way(model) for model in wanted.contexts])
            order = statistics.median([await bench.order(model) for model in wanted.contexts])
            lease = statistics.median([await bench.lease(model) for model in wanted.contexts])
            for model, batch in cells:
                grids = table.setdefault(model, {"1": {WHOLE: {}}})["1"]
                grids[WHOLE][str(batch)] = await bench.row(model, batch)
                bar.advance(task)
            for model in wanted.contexts if wanted.beside else ():
                grids = table[model]["1"]
                grids[BESIDE] = await bench.beside(model, grids[WHOLE], lambda: bar.advance(task))
    seconds = {"request_seconds": max(way, busy), "order_seconds": order, "lease_seconds": lease}
    return {SERVICE: {name: round(value, 6) for name, value in seconds.items()}} | table


class Bench:
    """Measures through a gateway."""

    def __init__(self, client: AsyncClient, wanted: Wanted, meter: Meter) -> None:
        self._traffic = Traffic(client, min(wanted.contexts.values()), meter)
        self._wanted = wanted
        self._prompts: dict[str, dict[int, float]] = {}
        """Seconds by model and tokens."""
        self._steps: dict[str, float] = {}
        """Seconds of the latest step that was measured, by model."""

    async def way(self, model: str) -> float:
        """Seconds of a request beside its jobs, on an idle device."""
        await self._traffic.seconds(model, 1, TINY, 2)  # wakes what sleeps
        first = [await self._traffic.seconds(model, 1, TINY, 1) for _ in range(LONE)]
        paces = [await self._pace({model: 1}, TINY) for _ in range(3)]
        self._steps[model] = statistics.median(pace.step for pace in paces)
        return max(0.0, statistics.median(first) - self._steps[model])

    async def busy_way(self, model: str) -> float:
        """The same while sequences decode on all lanes. 0: nobody counts, or no other model decodes, so that
        the prompts are computed in its leases."""
        models = self._others(model)[: self._wanted.lanes] or [model]
        steps = math.ceil(2 * SIDE_SECONDS / self._steps[model])
        async with self._traffic.decoding(dict.fromkeys(models, self._usual_batch), steps) as streams:
            before = await streams.meter()
            took = [await self._traffic.seconds(model, 1, TINY, 1) for _ in range(LONE)]
            spent = await streams.meter() - before
        return max(0.0, statistics.fmean(took) - _prompt_seconds(spent)) if spent.prompts else 0.0

    async def prompts(self, model: str, way: float) -> None:
        """Measure prompts of each length, for all that follows."""
        found = self._prompts[model] = {}
        for length in sorted(self._wanted.lengths):
            if length < self._wanted.contexts[model]:
                took = [await self._traffic.seconds(model, 1, length, 1) for _ in range(PROMPTS)]
                found[length] = max(1e-6, statistics.median(took) - way)

    async def order(self, model: str) -> float:
        """Seconds from the end of a prompt to the beginning of one that has waited for it, while sequences
        decode: those in which no prompt is computed, though one always waits."""
        if not (lengths := sorted(self._prompts[model])):
            return 0.0
        other = next(iter(self._others(model)), None)
        decoder = other or model
        steps = math.ceil(2 * SIDE_SECONDS / self._steps.get(decoder, self._steps[model]))
        async with (
            self._traffic.decoding({decoder: self._usual_batch}, steps) as streams,
            self._traffic.fed(model, self._apart(model, lengths), QUEUED),
        ):
            pace = await streams.pace(decoder, SIDE_SECONDS)
        if not (jobs := pace.spent.prompts):
            return 0.0
        return max(0.0, pace.seconds / jobs - _prompt_seconds(pace.spent))

    async def lease(self, model: str) -> float:
        """Seconds that a lease takes beside its steps, where twice as many models as run side by side take
        turns."""
        lanes, many = self._wanted.lanes, self._many(model)
        if len(many) <= lanes:
            return 0.0
        paces = [
            await self._pace(dict.fromkeys(many, self._usual_batch), TINY, SIDE_SECONDS)
            for _ in range(self._wanted.repeat)
        ]
        leases = sum(pace.spent.leases for pace in paces)
        return sum(pace.idle(lanes) for pace in paces) / leases if leases else 0.0

    def _many(self, model: str) -> list[str]:
        """This one and others, twice as many as run side by side if there are so many."""
        return [model, *self._others(model)][: 2 * self._wanted.lanes]

    def _others(self, model: str) -> list[str]:
        """Models whose sequences decode beside prompts of this one, or the other way round: its own would
        have short prompts computed in their leases."""
        return [name for name in self._wanted.company if name != model]

    def _apart(self, model: str, lengths: Sequence[int]) -> int:
        """Which of these, shortest first, prompts are to have that no lease takes along: the longest, where
        no other model decodes."""
        return _middle(lengths) if self._others(model) else lengths[-1]

    @property
    def _usual_batch(self) -> int:
        return sorted(self._wanted.batches)[len(self._wanted.batches) // 2]

    async def row(self, model: str, batch: int) -> dict[str, dict[str, float]]:
        """Milliseconds by length."""
        found = {}
        for length in self._wanted.lengths:
            prefill = self._prefill(model, batch * length)
            step = await self._step(model, batch, length)
            found[str(length)] = {"prefill": _milliseconds(prefill), "decoding": _milliseconds(step)}
        return found

    async def beside(self, model: str, alone: Grid, advance: Callable[[], None]) -> Grid:
        """The same grid with times of jobs side by side."""
        batches = sorted(self._wanted.batches)
        looked = {batches[0], batches[len(batches) // 2], batches[-1]}
        known = [n for n in sorted(self._wanted.lengths) if alone[str(batches[0])][str(n)]["decoding"] > 0]
        prefills: list[float] = []
        decode: dict[int, float] = {}
        together: dict[int, float] = {}
        for batch in batches:
            if batch in looked and known:
                found = await self._beside(model, batch, self._apart(model, known))
                step = alone[str(batch)][str(known[0])]["decoding"] / 1e3
                prefills.append(found.prefill)
                decode[batch] = max(1.0, found.decode.step / step)
                if found.together is not None:
                    together[batch] = max(1.0, found.together.lane_step / step)
            advance()
        if not prefills:
            return alone
        prefill = statistics.median(prefills)
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

    def _prefill(self, model: str, tokens: int) -> float | None:
        """Seconds of prompts with so many tokens in all. None: that is too many."""
        known = sorted(self._prompts[model].items())
        if not known or tokens > MOST:
            return None
        if len(known) == 1 or tokens <= known[0][0]:
            return known[0][1] * max(1.0, tokens / known[0][0])
        i = min(len(known) - 1, bisect_left([length for length, _ in known], tokens))
        (below, low), (above, high) = known[i - 1], known[i]
        return max(low, low + (high - low) * (tokens - below) / (above - below))

    async def _step(self, model: str, batch: int, length: int) -> float | None:
        """Seconds of a decode step. None: the sequences do not fit."""
        if batch * length > MOST or length + 2 > self._wanted.contexts[model]:
            return None
        paces = [await self._pace({model: batch}, length) for _ in range(self._wanted.repeat)]
        self._steps[model] = statistics.median(pace.step for pace in paces)
        return statistics.median(pace.lane_step for pace in paces)

    async def _pace(self, batches: Mapping[str, int], length: int, seconds: float = STEP_SECONDS) -> Pace:
        """Of the first of these models, while all decode. Sequences whose prompts come first go on while the
        others' are computed."""
        model, batch = next(iter(batches)), sum(batches.values())
        prompts = self._prompts.get(model) or {1: 0.0}
        step = self._steps.get(model, 1e-3)
        computed = batch * length * sum(prompts.values()) / sum(prompts)
        steps = math.ceil((2 * seconds + 3 * computed) / step)
        async with self._traffic.decoding(batches, steps, length) as streams:
            return await streams.pace(model, seconds)

    async def _beside(self, model: str, batch: int, length: int) -> Beside:
        """Of prompts of `length` and steps of `batch`."""
        traffic, steps = self._traffic, math.ceil(2 * SIDE_SECONDS / self._steps[model])
        other = next(iter(self._others(model)), None)
        async with (
            traffic.decoding({model: batch}, steps) as streams,
            traffic.fed(other or model, length, FEEDERS) as beside,
        ):
            decode = await streams.pace(model, SIDE_SECONDS)
        async with traffic.fed(other or model, length, FEEDERS) as alone:
            await asyncio.sleep(SIDE_SECONDS)
        prefill = beside.seconds / alone.seconds if alone.done > 1 and beside.done > 1 else 1.0
        together = None
        if other is not None and self._wanted.lanes > 1:
            async with traffic.decoding({model: batch, other: batch}, steps) as streams:
                together = await streams.pace(model, SIDE_SECONDS)
        return Beside(max(1.0, prefill), decode, together)


def _prompt_seconds(spent: Spent) -> float:
    """Of a prefill job, all of them beside decode jobs."""
    return spent.prompt_seconds / (1 - BESIDE_COUNTS) / spent.prompts


def _middle(lengths: Sequence[int]) -> int:
    return lengths[(len(lengths) - 1) // 2]


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
