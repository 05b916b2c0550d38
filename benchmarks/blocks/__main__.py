"""`python -m benchmarks.blocks`: tables for people, raw JSON for programs, a summary on the last line."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.blocks import bandwidth, memory, report
from benchmarks.blocks.layouts import Shape, fill
from benchmarks.blocks.results import Results
from benchmarks.engine import machine
from benchmarks.engine.ceilings import copy_bandwidth, read_bandwidth
from muxserve.engine.arena import SharedArena
from muxserve.engine.cpu.library import cpu_flags, variant

DESCRIPTION = f"""\
What the size of a block costs and gains. Decode attention over {bandwidth.BATCH} sequences in bfloat16, their
blocks scattered over an arena far larger than the caches, against KV that lies in one piece per sequence and
head, for the same kernel; prefill with a history; memory that is held and not used; size of the tables.

Speeds are ratios to the contiguous layout within a round, and the median over rounds; rounds in which the
kernel took a core away are left out where there are enough others. The last line is one JSON object.
"""

ROUNDS, QUICK_ROUNDS = 60, 9
DECODE_SECONDS = 12.0
"""Most that one shape gets, however slow the machine."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blocks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that compute")
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="ask for an arena in huge pages: private, not as workers have it",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write raw JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to write a plot (needs matplotlib)")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="measure nothing: print raw JSON as Markdown tables"
    )
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, progress: Progress) -> Results:
    """All of it."""
    begun = time.perf_counter()
    size = bandwidth.largest() * 5 // 4  # a quarter is free, as in a pool in use
    arena = _private_huge_pages(size) if options.huge_pages else SharedArena.create(size, mmap.PAGESIZE).data
    fill(arena)
    results = Results(environment=_environment(options, arena.nbytes))
    work = [("decode", *each, 1) for each in bandwidth.decode_shapes()]
    work += [("prefill", *each, bandwidth.CHUNK) for each in bandwidth.prefill_shapes()]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    task = progress.add_task("", total=len(work))
    for number, (kind, context, shape, new) in enumerate(work):
        if number % (len(work) // 3) == 0:
            progress.update(task, description="ceilings")
            results.copies.append(copy_bandwidth(options.threads))
            results.reads.append(read_bandwidth(options.threads))
        progress.update(task, description=_name(kind, context, shape))
        results.measured.append(
            bandwidth.measure(kind, context, shape, arena, rounds, DECODE_SECONDS, options.threads, new)
        )
        progress.advance(task)
    results.waste = memory.waste()
    results.tables = memory.tables()
    results.environment |= {"load_after": os.getloadavg(), "seconds": time.perf_counter() - begun}
    return results


def _private_huge_pages(size: int) -> NDArray[np.uint8]:
    """Memory that no other process can map; whether the kernel did as it is asked, `_huge_bytes` says."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def _huge_bytes() -> int:
    """Bytes of this process that lie in huge pages."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    found = {words[0]: words[1] for words in lines}
    return 1024 * sum(int(found.get(name, 0)) for name in ("AnonHugePages:", "ShmemPmdMapped:"))


def _environment(options: argparse.Namespace, arena_bytes: int) -> dict[str, Any]:
    return machine.describe() | {
        "threads": options.threads,
        "library": variant(cpu_flags()),
        "quick": options.quick,
        "arena_bytes": arena_bytes,
        "page_bytes": mmap.PAGESIZE,
        "huge_bytes": _huge_bytes(),
    }


def _name(kind: str, context: int, shape: Shape) -> str:
    return f"{kind}, context {context:,}, head size {shape.head_dim}, group {shape.group}"


def main() -> None:
    """Entry point."""
    options = parse()
    if options.render:
        results = msgspec.json.decode(options.render.read_bytes(), type=Results)
        print(report.markdown(results))
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            results = measure(options, progress)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_bytes(msgspec.json.encode(results) + b"\n")
        console = Console()
        for grid in report.grids(results):
            console.print(grid.rich())
    if options.plot:
        report.plot(results, options.plot)
    if not options.render:
        print(json.dumps(results.summary()))


if __name__ == "__main__":
    main()
