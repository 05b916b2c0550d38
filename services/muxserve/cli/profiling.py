"""Measures jobs and the service around them, as clients see them.

A prompt of a few tokens takes about a decode step, and what a request with one takes beyond that is the
service's: the time on its way. The time until `batch` prompts of `length` tokens, sent together, all have a
token is that and their prefill's; what further tokens add, divided by their number, is a decode step's.
Prompts are drawn, so that none has spans in the prefix cache.

The share 100 has times of jobs alone, 50 those of jobs that run beside one of the other kind: decode steps
while prompts come in all the time, and prompts while sequences decode, at some batches, times what that was
alone at all of them. Where decode jobs of two models run side by side, it has decode steps "together" too.

Two prompts under way at once, one of which always waits for the other, say what passes between two jobs.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from muxserve.client import AsyncClient
from muxserve.placement.solver.cost import SERVICE

STEPS = 24
"""Decode steps that a measurement has beyond the first token."""
TOKENS = range(100, 200)
"""Token ids that prompts are made of: every vocabulary has them."""
WHOLE, BESIDE = "100", "50"
"""Shares of the mesh that the table tells apart, in percent."""
MOST = 4096
"""Prompt tokens of a cell; larger ones take long, and follow from those below."""
TINY = 2
"""Tokens of a prompt whose prefill takes as long as a decode step."""
LONE = 15
"""Requests that are sent one after the other to learn what one takes beside its jobs."""
SIDE_SECONDS = 2.5
"""Seconds for which jobs run beside each other."""
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
        self._client = client
        self._wanted = wanted

    async def way(self, model: str) -> float:
        """Seconds of a request beside its jobs."""
        await self._seconds(model, 1, TINY, 1 + STEPS)  # wakes what sleeps
        first = [await self._seconds(model, 1, TINY, 1) for _ in range(LONE)]
        last = [await self._seconds(model, 1, TINY, 1 + STEPS) for _ in range(max(3, LONE // 3))]
        prefill = statistics.median(first)
        step = (statistics.median(last) - prefill) / STEPS
        return max(0.0, prefill - max(0.0, step))

    async def order(self, model: str, way: float) -> float:
        """Seconds from the end of a prompt to the beginning of one that has waited for it: what lies between
        two ends, less what jobs take."""
        length = max((n for n in self._wanted.lengths if n < self._wanted.contexts[model]), default=TINY)
        alone = statistics.median([await self._seconds(model, 1, length, 1) for _ in range(LONE)])
        async with self._fed(model, length, QUEUED) as prompts:
            began = time.perf_counter()
            await asyncio.sleep(max(SIDE_SECONDS, LONE * alone))
            each = (time.perf_counter() - began) / max(1, prompts.done)
        return max(0.0, each - (alone - way))

    async def row(self, model: str, batch: int, way: float) -> dict[str, dict[str, float]]:
        """Milliseconds by length."""
        found = {}
        for length in self._wanted.lengths:
            fits = length + STEPS + 1 <= self._wanted.contexts[model] and batch * length <= MOST
            prefill, step = await self._cell(model, batch, length, way) if fits else (-1.0, -1.0)
            found[str(length)] = {"prefill": prefill, "decoding": step}
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

    async def _cell(self, model: str, batch: int, length: int, way: float) -> tuple[float, float]:
        """Milliseconds of a prefill and of a decode step: medians."""
        repeat = self._wanted.repeat
        first = [await self._seconds(model, batch, length, 1) for _ in range(repeat)]
        last = [await self._seconds(model, batch, length, 1 + STEPS) for _ in range(repeat)]
        prefill = statistics.median(first)
        step = max(1e-6, (statistics.median(last) - prefill) / STEPS)
        return round(1e3 * max(1e-6, prefill - way), 4), round(1e3 * step, 4)

    async def _slower(self, model: str, batch: int, length: int, step: float) -> Slower:
        """Of prompts of `length` and steps of `batch`. `step`: seconds of one alone."""
        async with self._decoding({model: batch}, step) as streams, self._fed(model, length) as prompts:
            decode = await streams.step(model) / step
            beside, passed = prompts.done, streams.passed
        async with self._fed(model, length) as prompts:
            await asyncio.sleep(min(passed, SIDE_SECONDS))
            alone = prompts.done * passed / min(passed, SIDE_SECONDS)
        together = None
        if other := next((name for name in self._wanted.company if name != model), None):
            async with self._decoding({model: batch, other: batch}, step) as streams:
                together = max(1.0, await streams.step(model) / step)
        return Slower(max(1.0, alone / beside) if beside else 1.0, max(1.0, decode), together)

    @asynccontextmanager
    async def _decoding(self, batches: Mapping[str, int], step: float) -> AsyncIterator[Streams]:
        """So many sequences of each model that decode meanwhile, for about SIDE_SECONDS if a step took `step`
        seconds."""
        counts = {model: [0] * batch for model, batch in batches.items()}
        running = asyncio.Event()

        async def stream(model: str, index: int) -> None:
            most = self._wanted.contexts.get(model, self._least) - TINY - 1
            tokens = 1 + max(STEPS, min(most, round(SIDE_SECONDS / step)))
            async with self._client.stream(
                model, prompt_tokens=_prompt(TINY), max_tokens=tokens, ignore_eos=True, temperature=0.0
            ) as answer:
                async for chunk in answer:
                    counts[model][index] += len(chunk.token_ids)
                    if all(map(all, counts.values())):
                        running.set()

        tasks = [
            asyncio.create_task(stream(model, i)) for model, batch in batches.items() for i in range(batch)
        ]
        try:
            await running.wait()
            yield Streams(tasks, counts)
        finally:
            await _end(*tasks)

    @asynccontextmanager
    async def _fed(self, model: str, length: int, count: int = FEEDERS) -> AsyncIterator[Counted]:
        """So many prompts of a model always under way meanwhile."""
        prompts = Counted()

        async def feed() -> None:
            while True:
                await self._seconds(model, 1, length, 1)
                prompts.done += 1

        tasks = [asyncio.create_task(feed()) for _ in range(count)]
        try:
            yield prompts
        finally:
            await _end(*tasks)

    @property
    def _least(self) -> int:
        """Tokens that any model takes which was asked for."""
        return min(self._wanted.contexts.values())

    async def _seconds(self, model: str, batch: int, length: int, tokens: int) -> float:
        """From sending `batch` requests until all have all of their tokens."""
        prompts = [_prompt(length) for _ in range(batch)]
        began = time.perf_counter()
        await asyncio.gather(
            *(
                self._client.generate(
                    model, prompt_tokens=prompt, max_tokens=tokens, ignore_eos=True, temperature=0.0
                )
                for prompt in prompts
            )
        )
        return time.perf_counter() - began


@dataclass(slots=True)
class Streams:
    """Sequences that decode."""

    tasks: Sequence[asyncio.Task[None]]
    counts: Mapping[str, Sequence[int]]
    """Tokens that each has, by model."""
    passed: float = 0.0
    """Seconds until one of them had all."""

    async def step(self, model: str) -> float:
        """Seconds of a step of that model, from now until one of all has all its tokens."""
        counts, began = self.counts[model], time.perf_counter()
        before = sum(counts)
        await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        self.passed = time.perf_counter() - began
        return len(counts) * self.passed / max(1, sum(counts) - before)


@dataclass(slots=True)
class Counted:
    """Prompts that were computed."""

    done: int = 0


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _prompt(length: int) -> list[int]:
    return [random.choice(TOKENS) for _ in range(length)]


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
