"""`muxserve profile`: measure a cost table on a running deployment, which should have nothing else to do.

What is measured is what clients see: the time until `batch` prompts of `length` tokens, sent together, all
have a token is their prefill's, and what further tokens add to that, divided by their number, is a decode
step's. Prompts are drawn, so that none has spans in the prefix cache. Shares are not told apart: the table
has times of jobs alone; a job with a share of the device is taken to be slower in proportion.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from muxserve.cli.calls import exit_code
from muxserve.client import AsyncClient, Client

STEPS = 24
"""Decode steps that a measurement has beyond the first token."""
TOKENS = range(100, 200)
"""Token ids that prompts are made of: every vocabulary has them."""
WHOLE_MESH = "100"
Table = dict[str, dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]]


def run(
    address: str,
    models: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    repeat: int,
    out: Path,
) -> int:
    """Measure, and write the table; the exit code."""

    def command() -> None:
        with Client(address) as client:
            contexts = {model.name: model.context_length for model in client.models()}
        names = [name for name in models or sorted(contexts) if name in contexts]
        if missing := sorted(set(models) - set(contexts)):
            typer.echo(f"not served, left out: {', '.join(missing)}", err=True)
        table = asyncio.run(measure(address, {n: contexts[n] for n in names}, batches, lengths, repeat))
        out.write_text(json.dumps(table, indent=1) + "\n")

    return exit_code(command)


async def measure(
    address: str, contexts: dict[str, int], batches: Sequence[int], lengths: Sequence[int], repeat: int
) -> Table:
    """The table, by model. `contexts`: most tokens of each; what does not fit is -1."""
    table: Table = {}
    cells = [(model, batch, length) for model in contexts for batch in batches for length in lengths]
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=len(cells))
        async with AsyncClient(address) as client:
            for model, batch, length in cells:
                grid = table.setdefault(model, {"1": {WHOLE_MESH: {}}})["1"][WHOLE_MESH]
                fits = length + STEPS + 1 <= contexts[model]
                cell = await _cell(client, model, batch, length, repeat) if fits else (-1.0, -1.0)
                grid.setdefault(str(batch), {})[str(length)] = {"prefill": cell[0], "decoding": cell[1]}
                bar.advance(task)
    return table


async def _cell(client: AsyncClient, model: str, batch: int, length: int, repeat: int) -> tuple[float, float]:
    """Milliseconds of a prefill and of a decode step: medians."""
    first = [await _seconds(client, model, batch, length, 1) for _ in range(repeat)]
    last = [await _seconds(client, model, batch, length, 1 + STEPS) for _ in range(repeat)]
    prefill = statistics.median(first)
    step = max(1e-6, (statistics.median(last) - prefill) / STEPS)
    return round(1e3 * prefill, 4), round(1e3 * step, 4)


async def _seconds(client: AsyncClient, model: str, batch: int, length: int, tokens: int) -> float:
    """From sending `batch` requests until all have all of their tokens."""
    prompts = [[random.choice(TOKENS) for _ in range(length)] for _ in range(batch)]
    began = time.perf_counter()
    await asyncio.gather(
        *(
            client.generate(model, prompt_tokens=prompt, max_tokens=tokens, ignore_eos=True, temperature=0.0)
            for prompt in prompts
        )
    )
    return time.perf_counter() - began
