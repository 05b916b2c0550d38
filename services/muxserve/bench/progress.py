"""A line that says how far a run is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from muxserve.bench.generator import Generator
from muxserve.bench.outcomes import Status

REFRESH = 0.5
"""Seconds. Drawing takes time of the cores that are measured."""
LINE_EVERY = 10.0
"""Seconds between lines where nothing can be drawn over."""


@asynccontextmanager
async def shown(generator: Generator, label: str, console: Console) -> AsyncIterator[None]:
    """Show the run inside the block: one live line on a terminal, else a line now and then."""
    loop = asyncio.get_running_loop()
    begun = loop.time()

    def line() -> Text:
        return Text(_line(generator, label, loop.time() - begun))

    if console.is_terminal:
        with Live(line(), console=console, auto_refresh=False, transient=True) as live:
            task = asyncio.create_task(_every(REFRESH, lambda: live.update(line(), refresh=True)))
            try:
                yield
            finally:
                await _end(task)
    else:
        task = asyncio.create_task(_every(LINE_EVERY, lambda: console.print(line())))
        try:
            yield
        finally:
            await _end(task)


def _line(generator: Generator, label: str, seconds: float) -> str:
    now = generator.progress
    refused = now.by_status.get(Status.REFUSED, 0)
    bad = now.by_status.get(Status.FAILED, 0) + now.by_status.get(Status.LATE, 0)
    return (
        f"{label} {seconds:5.0f} s  {now.sent}/{now.total} sent, {now.open} open, {now.ended} ended"
        f" ({refused} refused, {bad} late or failed), {now.tokens / max(seconds, 0.1):.0f} tokens/s"
    )


async def _every(seconds: float, act: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        act()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
