"""A thousand requests at nine tenths of the pool: `python -m benchmarks.engine.steady`.

Requests of random lengths come whenever there is room below the target, grow block group by block group,
and free everything when they end. Does anything leak, and are the last hundred as fast as the first?

What is compared is the same hundred requests, prompts and all, which come again and again in the same order:
so that lengths are not what differs, and so that every text must come out as it did the first time, whatever
batch it was in. The first hundred are counted once the pool has reached its target; requests keep coming
until the last hundred have ended. For each: seconds from its admission to its end by token of its text, as
the clock has it and in processor time (its share of every job that it was in). Ratios are medians over the
hundred pairs. Processor time is what tells where other programs use the same cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine import machine
from benchmarks.engine.cohort import Options
from benchmarks.engine.loop import Ended, Loop, Mark


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, for JSON. Raises PoolIntegrityError, TablesError, AssertionError if the
    books do not balance at the end, or a text differs from what the same request got before."""
    environment = machine.describe()
    loop = Loop(options)
    others = machine.Others([psutil.Process().pid])
    try:
        loop.run()
        loop.check()
    finally:
        loop.close()
    counted = [one for one in loop.done if one.counted]
    first: dict[int, Ended] = {}
    for one in counted:
        first.setdefault(one.number, one)
    last = {one.number: one for one in counted}
    wrong = [one.number for one in loop.done if not one.same_text]
    if wrong:
        raise AssertionError(f"requests {wrong} said something else than before")
    begin, end = loop.marks[0], loop.marks[-1]
    return {
        "environment": environment,
        "options": {**asdict(options), "model": str(options.model or "SmolLM2-135M-Instruct")},
        "requests": {"all": len(loop.done), "counted": len(counted), "recomputed": loop.recomputed},
        "pool": {
            "blocks": loop.blocks,
            "used_median": statistics.median(loop.used),
            "used_deciles": statistics.quantiles(loop.used, n=10),
        },
        "tokens_per_s": (end.tokens - begin.tokens) / (end.at - begin.at),
        "others_cores": others.cores(),
        "hundreds": [_between(*pair) for pair in itertools.pairwise(loop.marks)],
        "last_over_first": {
            "pairs": len(first),
            "wall": _ratio(first, last, "wall_per_token_s"),
            "cpu": _ratio(first, last, "cpu_per_token_s"),
        },
        # From the end of the first hundred on: until then blocks and buffers are touched for the first time.
        "resident_bytes": {"begin": loop.marks[1].resident_bytes, "end": end.resident_bytes},
        "descriptors": {"begin": begin.descriptors, "end": end.descriptors},
        "threads": {"begin": begin.threads, "end": end.threads},
        "ended": [asdict(one) for one in counted],
    }


def _between(one: Mark, other: Mark) -> dict[str, Any]:
    tokens = other.tokens - one.tokens
    return {
        "ended": other.ended,
        "tokens_per_s": tokens / (other.at - one.at),
        "cpu_ms_per_token": 1000 * (other.cpu_s - one.cpu_s) / tokens,
        "resident_bytes": other.resident_bytes,
    }


def _ratio(first: dict[int, Ended], last: dict[int, Ended], field_name: str) -> dict[str, float]:
    """Of the last time to the first, by request: above 1 is slower."""
    ratios = [getattr(last[number], field_name) / getattr(first[number], field_name) for number in first]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each hundred, and the JSON without single requests last."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.steady",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="model directory or GGUF file")
    parser.add_argument("--requests", type=int, default=Options.requests)
    parser.add_argument("--streams", type=int, default=Options.streams)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--block-bytes", type=int, default=Options.block_bytes)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--out", type=Path, help="raw results, as JSON")
    chosen = vars(parser.parse_args(argv))
    out = chosen.pop("out")
    found = run(Options(**chosen))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    for hundred in found["hundreds"]:
        print(
            f"{hundred['ended']:6d} requests {hundred['tokens_per_s']:8.0f} tokens/s "
            f"{hundred['cpu_ms_per_token']:7.3f} ms of processor a token "
            f"{hundred['resident_bytes'] / 2**20:8.1f} MiB resident"
        )
    del found["ended"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
