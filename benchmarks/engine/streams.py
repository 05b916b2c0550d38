"""A deployment's gateway as a contender: `python -m benchmarks.engine.streams --address … --model NAME`.

One concurrent gRPC stream per prompt, all from this process over one channel, through the asyncio client.
Tokens count when their message has been read. Text comes along and is not looked at.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import uvloop

from benchmarks.engine.peers.wire import Generate, Prompts, Stopwatch, Timing, serve
from muxserve.client import AsyncClient


def start(options: argparse.Namespace) -> tuple[Generate, dict[str, Any]]:
    """Connects; the deployment is ready already."""
    # One loop for all requests: the channel belongs to it.
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    client = AsyncClient(options.address)

    async def one(number: int, ids: list[int], new: int, clock: Stopwatch) -> None:
        stream = client.stream(
            options.model, prompt_tokens=ids, max_tokens=new, temperature=0, ignore_eos=True
        )
        async for chunk in stream:
            clock.arrived([(number, list(chunk.token_ids))])

    async def every(prompts: Prompts, new: int) -> Timing:
        clock = Stopwatch(len(prompts))
        async with asyncio.TaskGroup() as group:
            for number, ids in enumerate(prompts):
                group.create_task(one(number, ids, new, clock))
        return clock.timing(new)

    return lambda prompts, new: runner.run(every(prompts, new)), {}


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", required=True, help="name that it is served under")
    options = parser.parse_args()
    serve(lambda: start(options))


if __name__ == "__main__":
    main()
