"""Tokens per second and time to first token through all services, for a `muxserve up` that is running.

    muxserve up --model a=… --model b=… &
    python -m benchmarks.serving --model a --model b --streams 1 8 32 --out benchmarks/results/serving.json

Every level runs its streams spread evenly over the models, from this process, greedily and to their full
length, after one short request per model that is not counted. Raw numbers go to --out, with the machine they
come from.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from muxserve.client import AsyncClient

PROMPT = "The history of the steam engine begins long before"


async def stream(client: AsyncClient, model: str, tokens: int) -> dict[str, Any]:
    """One request: seconds to the first token, seconds in all, tokens."""
    begun, first, count = time.perf_counter(), 0.0, 0
    async for chunk in client.stream(model, PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True):
        count += len(chunk.token_ids)
        first = first or time.perf_counter() - begun
    return {"model": model, "ttft_s": first, "seconds": time.perf_counter() - begun, "tokens": count}


async def level(client: AsyncClient, models: list[str], streams: int, tokens: int) -> dict[str, Any]:
    """`streams` requests at once."""
    begun = time.perf_counter()
    requests = await asyncio.gather(
        *(stream(client, models[i % len(models)], tokens) for i in range(streams))
    )
    seconds = time.perf_counter() - begun
    return {
        "streams": streams,
        "seconds": seconds,
        "tokens_per_s": sum(r["tokens"] for r in requests) / seconds,
        "ttft_s_median": statistics.median(r["ttft_s"] for r in requests),
        "requests": requests,
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All levels, `--repeat` times in turn."""
    levels = []
    async with AsyncClient(options.address) as client:
        await asyncio.gather(*(stream(client, model, 4) for model in options.model))
        with Progress(transient=True) as progress:
            task = progress.add_task("measuring", total=options.repeat * len(options.streams))
            for _ in range(options.repeat):
                for streams in options.streams:
                    levels.append(await level(client, options.model, streams, options.tokens))
                    progress.advance(task)
    return {
        "environment": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_before": options.load,
        },
        "models": options.model,
        "tokens_per_request": options.tokens,
        "levels": levels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--address", default="127.0.0.1:8600")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="per request")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.load = os.getloadavg()[0]
    result = asyncio.run(measure(options))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for one in result["levels"]:
        print(
            f"{one['streams']:3} streams: {one['tokens_per_s']:7.1f} tokens/s,"
            f" first token after {1000 * one['ttft_s_median']:6.0f} ms (median)"
        )


if __name__ == "__main__":
    main()
