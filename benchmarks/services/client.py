"""`python -m benchmarks.services.client`: a client process with many streams, which reports as JSON.

After a request that is not counted it says that it is warm, and waits for a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from typing import Any

from muxserve.client import AsyncClient

PROMPT = "The history of the steam engine begins long before"


async def stream(client: AsyncClient, model: str, tokens: int) -> dict[str, Any]:
    """One request. `arrivals`: (seconds since its start, tokens) of each piece; `sent`: its start, in seconds
    of the clock that all processes share."""
    begun = time.monotonic()
    chunks = client.stream(model, PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    arrivals = [(time.monotonic() - begun, len(chunk.token_ids)) async for chunk in chunks]
    return {"begun": begun, "arrivals": arrivals}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, one after the other."""
    async with AsyncClient(options.address) as client:
        await stream(client, options.model, 4)
        print("warm", flush=True)
        sys.stdin.readline()
        used = time.process_time()
        begun = time.monotonic()
        rounds = [
            await asyncio.gather(
                *(stream(client, options.model, options.tokens) for _ in range(options.streams))
            )
            for _ in range(options.rounds)
        ]
        seconds = time.monotonic() - begun
    return {
        "seconds": seconds,
        "cpu_s": time.process_time() - used,
        "switches": resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw,
        "requests": [request for each in rounds for request in each],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
