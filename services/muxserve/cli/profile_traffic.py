"""Requests that `muxserve profile` sends: prompts, sequences that decode, and both at once."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass

from muxserve.client import AsyncClient

TOKENS = range(100, 200)
"""Token ids that prompts are made of: every vocabulary has them."""
TINY = 2
"""Tokens of a prompt whose prefill takes as long as a decode step."""
SPARE = 0.2
"""Part of a lane that may seem to be in use by what has begun before, or has not ended."""


@dataclass(frozen=True, slots=True)
class Spent:
    """By all models, since whoever counts began."""

    leases: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of decode lanes, as workers measured them."""
    prompts: int = 0
    """Prefill jobs."""
    prompt_seconds: float = 0.0
    """On these; half of the time counts that a decode job ran beside them."""

    def __sub__(self, before: Spent) -> Spent:
        return Spent(*(mine - its for mine, its in zip(astuple(self), astuple(before), strict=True)))


Meter = Callable[[], Awaitable[Spent]]


@dataclass(frozen=True, slots=True)
class Pace:
    """Of sequences that decode. step: seconds from one token to the next. spent: by all, in `seconds`."""

    step: float
    seconds: float
    spent: Spent

    @property
    def lane_step(self) -> float:
        """Seconds of a lane that a step took, of whatever model; `step` where nobody counts."""
        return self.spent.seconds / self.spent.steps if self.spent.steps else self.step

    def idle(self, lanes: int) -> float:
        """Seconds in which lanes that were used had nothing to do, of so many that there are."""
        used = min(lanes, math.ceil(self.spent.seconds / self.seconds - SPARE))
        return max(0.0, used * self.seconds - self.spent.seconds)


class Traffic:
    """Through a gateway. `context`: tokens that a sequence of any model may have."""

    def __init__(self, client: AsyncClient, context: int, meter: Meter) -> None:
        self._client = client
        self._context = context
        self._meter = meter

    @asynccontextmanager
    async def decoding(
        self, batches: Mapping[str, int], steps: int, length: int = TINY
    ) -> AsyncIterator[Streams]:
        """So many sequences of each model, with prompts of so many tokens, that decode meanwhile: from when
        all of them do, until the first has done so many steps or reached its model's context."""
        counts = {model: [0] * batch for model, batch in batches.items()}
        running = asyncio.Event()

        async def stream(model: str, index: int) -> None:
            tokens = min(self._context - length, 1 + steps)
            async with self._client.stream(
                model, prompt_tokens=_prompt(length), max_tokens=tokens, ignore_eos=True, temperature=0.0
            ) as answer:
                async for chunk in answer:
                    counts[model][index] += len(chunk.token_ids)
                    if all(map(all, counts.values())):
                        running.set()

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                running.set()

        tasks = [
            asyncio.create_task(stream(model, i)) for model, batch in batches.items() for i in range(batch)
        ]
        for task in tasks:
            task.add_done_callback(ended)
        try:
            await running.wait()
            for task in tasks:
                if task.done():
                    task.result()  # raises what went wrong
            yield Streams(tasks, counts, self._meter)
        finally:
            await _end(*tasks)
            await self._settle(*batches)

    @asynccontextmanager
    async def fed(self, model: str, length: int, count: int) -> AsyncIterator[Counted]:
        """So many prompts of a model always under way meanwhile."""
        prompts = Counted()

        async def feed() -> None:
            while True:
                await self.seconds(model, 1, length, 1)
                prompts.note()

        tasks = [asyncio.create_task(feed()) for _ in range(count)]
        try:
            yield prompts
        finally:
            await _end(*tasks)
            await self._settle(model)

    async def _settle(self, *models: str) -> None:
        """Wait until jobs of requests that were cancelled are over."""
        for model in models:
            await self.seconds(model, 1, TINY, 2)

    async def seconds(self, model: str, batch: int, length: int, tokens: int) -> float:
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
    meter: Meter

    async def pace(self, model: str, seconds: float) -> Pace:
        """Of that model, over so many seconds from now on, or until one of all sequences has all of its
        tokens."""
        spent, began, before = await self.meter(), time.perf_counter(), self._steps()[model]
        await asyncio.wait(self.tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        passed, after = time.perf_counter() - began, self._steps()[model]
        return Pace(passed / max(1e-3, after - before), passed, await self.meter() - spent)

    def _steps(self) -> dict[str, float]:
        return {name: sum(counts) / len(counts) for name, counts in self.counts.items()}


@dataclass(slots=True)
class Counted:
    """Prompts that were computed."""

    done: int = 0
    first: float = 0.0
    last: float = 0.0
    """When the first and the latest one had been."""

    def note(self) -> None:
        """Another one was."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.done += 1

    @property
    def seconds(self) -> float:
        """From one to the next, on average. Infinity: there were not two."""
        return (self.last - self.first) / (self.done - 1) if self.done > 1 else float("inf")


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _prompt(length: int) -> list[int]:
    return [random.choice(TOKENS) for _ in range(length)]
