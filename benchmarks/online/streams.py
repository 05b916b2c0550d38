"""Sends a workload and notes, stream by stream, what came when: nothing may be lost, or come twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from muxserve.bench.workload import Request
from muxserve.client import AsyncClient, ClientOptions, MuxServeError


@dataclass(slots=True)
class Stream:
    """One request and its answer. Moments are seconds after the run's begin."""

    at: float
    """Intended arrival."""
    model: str
    prompt_tokens: int
    asked: int
    tokens: int = 0
    repeated: int = 0
    """Tokens with an index that was there already."""
    skipped: int = 0
    """Tokens missing before one that came."""
    first: float = -1.0
    end: float = -1.0
    pause: float = 0.0
    """Longest time between two messages."""
    paused_at: float = -1.0
    """When it began."""
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether all came, once and in order."""
        return not (self.error or self.repeated or self.skipped) and self.tokens == self.asked


@dataclass(slots=True)
class Run:
    """Streams in order of arrival."""

    begin: float
    """On the monotonic clock."""
    streams: list[Stream] = field(default_factory=list)


async def send(address: str, requests: Sequence[Request], run: Run, drain: float) -> None:
    """Send each request when it is due, whatever became of those before; wait up to `drain` seconds for the
    rest after the last one."""
    tasks: set[asyncio.Task[None]] = set()
    async with AsyncClient(address, options=ClientOptions(timeout=3600, max_retries=0)) as client:
        try:
            for request in requests:
                stream = Stream(request.at, request.model, request.prompt_tokens, request.output_tokens)
                run.streams.append(stream)
                if (wait := run.begin + request.at - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                task = asyncio.create_task(_one(client, request, stream, run.begin))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks, timeout=drain)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _one(client: AsyncClient, request: Request, stream: Stream, begin: float) -> None:
    assert not isinstance(request.prompt, str)
    try:
        async with client.stream(
            request.model,
            prompt_tokens=request.prompt,
            max_tokens=request.output_tokens,
            temperature=0,
            ignore_eos=True,
        ) as answer:
            async for chunk in answer:
                if chunk.token_ids:
                    _note(stream, chunk.index, len(chunk.token_ids), time.monotonic() - begin)
    except MuxServeError as error:
        stream.error = f"{type(error).__name__}: {error.message}"
    except asyncio.CancelledError:
        stream.error = "unfinished"
        raise


def _note(stream: Stream, index: int, count: int, now: float) -> None:
    stream.repeated += max(0, stream.tokens - index)
    stream.skipped += max(0, index - stream.tokens)
    stream.tokens = max(stream.tokens, index + count)
    if stream.first < 0:
        stream.first = now
    elif now - stream.end > stream.pause:
        stream.pause, stream.paused_at = now - stream.end, stream.end
    stream.end = now
