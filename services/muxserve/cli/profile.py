"""`muxserve profile`: measure a cost table on a running deployment, which should have nothing else to do.

What is measured is what clients see. A prompt of a few tokens takes about a decode step, and what a request
with one takes beyond that is the service's: the time on its way. The time until `batch` prompts of `length`
tokens, sent together, all have a token is that and their prefill's; what further tokens add, divided by their
number, is a decode step's. Prompts are drawn, so that none has spans in the prefix cache.

The share 100 has times of jobs alone, 50 those of jobs that run beside one of the other kind: decode steps
while prompts come in all the time, and prompts while sequences decode, at some batches, times what that was
alone at all of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import typer
from rich.console import Console
from rich.progress import Progress

from muxserve.cli.calls import exit_code
from muxserve.client import AsyncClient, Client
from muxserve.placement.solver.cost import SERVICE
from muxserve.v1 import admin_pb2, admin_pb2_grpc

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
"""Seconds for which jobs of both kinds run beside each other."""
FEEDERS = 3
"""Prompts under way at once meanwhile: one is computed, the others wait."""
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


def run(
    address: str,
    models: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    repeat: int,
    out: Path,
    admin: str,
) -> int:
    """Measure, and write the table; the exit code."""

    def command() -> None:
        with Client(address) as client:
            contexts = {model.name: model.context_length for model in client.models()}
        names = [name for name in models or sorted(contexts) if name in contexts]
        if missing := sorted(set(models) - set(contexts)):
            typer.echo(f"not served, left out: {', '.join(missing)}", err=True)
        wanted = Wanted({name: contexts[name] for name in names}, batches, lengths, repeat)
        table = asyncio.run(measure(address, wanted))
        table[SERVICE] |= describe(admin)
        out.write_text(json.dumps(table, indent=1) + "\n")

    return exit_code(command)


def describe(admin: str) -> dict[str, int]:
    """Cores and slots, if the placement service says so and workers are alike."""
    with suppress(grpc.RpcError), grpc.insecure_channel(admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        workers = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5).workers
        units = {worker.compute_units if worker.device == "cpu" else 0 for worker in workers}
        slots = {model.shape.slots for worker in workers for model in worker.models}
        lanes = {sum(each.kind != "prefill" for each in worker.executors) for worker in workers}
        if len(units) == len(slots) == len(lanes) == 1:
            return {"compute_units": units.pop(), "slots": slots.pop(), "decode_lanes": max(1, lanes.pop())}
    typer.echo(f"{admin} does not say how many cores and slots there are, or they differ", err=True)
    return {}


async def measure(address: str, wanted: Wanted) -> Table:
    """The table."""
    table: Table = {}
    cells = [(model, batch) for model in wanted.contexts for batch in wanted.batches]
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=len(cells) * (1 + wanted.beside))
        async with AsyncClient(address) as client:
            bench = Bench(client, wanted)
            ways = [await bench.way(model) for model in wanted.contexts]
            way = statistics.median(ways)
            for model, batch in cells:
                grids = table.setdefault(model, {"1": {WHOLE: {}}})["1"]
                grids[WHOLE][str(batch)] = await bench.row(model, batch, way)
                bar.advance(task)
            for model in wanted.contexts if wanted.beside else ():
                grids = table[model]["1"]
                grids[BESIDE] = await bench.beside(model, grids[WHOLE], lambda: bar.advance(task))
    return {SERVICE: {"request_seconds": round(way, 6)}} | table


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

    async def row(self, model: str, batch: int, way: float) -> dict[str, dict[str, float]]:
        """Milliseconds by length."""
        found = {}
        for length in self._wanted.lengths:
            fits = length + STEPS + 1 <= self._wanted.contexts[model] and batch * length <= MOST
            prefill, step = await self._cell(model, batch, length, way) if fits else (-1.0, -1.0)
            found[str(length)] = {"prefill": prefill, "decoding": step}
        return found

    async def beside(self, model: str, alone: Grid, advance: Any) -> Grid:
        """The same grid with times beside jobs of the other kind."""
        batches = sorted(self._wanted.batches)
        looked = sorted({batches[0], batches[len(batches) // 2], batches[-1]})
        known = [n for n in sorted(self._wanted.lengths) if alone[str(batches[0])][str(n)]["decoding"] > 0]
        factors: dict[int, tuple[float, float]] = {}
        for batch in batches:
            if batch in looked and known:
                step = alone[str(batch)][str(known[0])]["decoding"] / 1e3
                factors[batch] = await self._factors(model, batch, known[-1], step)
            advance()
        if not factors:
            return alone
        slower = statistics.median(prefill for prefill, _ in factors.values())
        return {
            str(batch): {
                n: {
                    "prefill": _scaled(cell["prefill"], slower),
                    "decoding": _scaled(cell["decoding"], _between(batch, factors)),
                }
                for n, cell in alone[str(batch)].items()
            }
            for batch in batches
        }

    async def _cell(self, model: str, batch: int, length: int, way: float) -> tuple[float, float]:
        """Milliseconds of a prefill and of a decode step: medians."""
        repeat = self._wanted.repeat
        first = [await self._seconds(model, batch, length, 1) for _ in range(repeat)]
        last = [await self._seconds(model, batch, length, 1 + STEPS) for _ in range(repeat)]
        prefill = statistics.median(first)
        step = max(1e-6, (statistics.median(last) - prefill) / STEPS)
        return round(1e3 * max(1e-6, prefill - way), 4), round(1e3 * step, 4)

    async def _factors(self, model: str, batch: int, length: int, step: float) -> tuple[float, float]:
        """How many times as long prompts and steps of a batch take beside each other. `step`: seconds of one
        alone."""
        most = self._wanted.contexts[model] - TINY - 1
        steps = max(STEPS, min(most, round(SIDE_SECONDS / step)))
        counts, running, prompts = [0] * batch, asyncio.Event(), Counted()
        streams = [asyncio.create_task(self._stream(model, steps, counts, i, running)) for i in range(batch)]
        try:
            await running.wait()
            began, before = time.perf_counter(), sum(counts)
            feeding = asyncio.create_task(self._feed(model, length, prompts))
            await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
            passed, after = time.perf_counter() - began, sum(counts)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        busy = prompts.done
        prompts.done, began = 0, time.perf_counter()
        await asyncio.sleep(min(passed, SIDE_SECONDS))
        rate = prompts.done / (time.perf_counter() - began)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        slower = rate * passed / busy if busy and rate else 1.0
        decode = batch * passed / max(1, after - before) / step
        return max(1.0, slower), max(1.0, decode)

    async def _stream(
        self, model: str, steps: int, counts: list[int], index: int, running: asyncio.Event
    ) -> None:
        """Count its tokens; `running` is set once all have some, or one has ended."""
        async with self._client.stream(
            model, prompt_tokens=_prompt(TINY), max_tokens=1 + steps, ignore_eos=True, temperature=0.0
        ) as answer:
            async for chunk in answer:
                counts[index] += len(chunk.token_ids)
                if all(counts):
                    running.set()

    async def _feed(self, model: str, length: int, prompts: Counted) -> None:
        """Keep prompts under way until cancelled."""

        async def one() -> None:
            while True:
                await self._seconds(model, 1, length, 1)
                prompts.done += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(FEEDERS):
                group.create_task(one())

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
class Counted:
    """Prompts that were computed."""

    done: int = 0


def _prompt(length: int) -> list[int]:
    return [random.choice(TOKENS) for _ in range(length)]


def _scaled(milliseconds: float, factor: float) -> float:
    return round(milliseconds * factor, 4) if milliseconds > 0 else milliseconds


def _between(batch: int, factors: Mapping[int, tuple[float, float]]) -> float:
    """The factor of decode steps at a batch, by those of the nearest batches that were looked at."""
    known = sorted(factors)
    low = max((b for b in known if b <= batch), default=known[0])
    high = min((b for b in known if b >= batch), default=known[-1])
    if low == high:
        return factors[low][1]
    part = (batch - low) / (high - low)
    return factors[low][1] + part * (factors[high][1] - factors[low][1])
