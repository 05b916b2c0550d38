"""`Results` as tables, for the terminal and for `docs/block-size.md`, and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.blocks.bandwidth import CHUNK, HISTORY, Measured
from benchmarks.blocks.layouts import CONTIGUOUS, IN_ORDER, LAYOUTS, SIZES
from benchmarks.blocks.memory import LONGEST, POOL_SEQUENCES, POOL_TOKENS, WORKLOADS
from benchmarks.blocks.results import Results
from benchmarks.engine.report import Grid

OTHERS = tuple(name for name in LAYOUTS if name != CONTIGUOUS)


def grids(results: Results) -> list[Grid]:
    """All tables."""
    found = [_machine(results), _summary(results), _decode(results)]
    if any(one.kind == "prefill" for one in results.measured):
        found.append(_prefill(results))
    return [*found, _waste(results), _tables(results)]


def markdown(results: Results) -> str:
    """All tables."""
    return "\n".join(grid.markdown() for grid in grids(results))


def _machine(results: Results) -> Grid:
    told = results.environment
    quiet = [one.quiet for one in results.measured]
    rows = (
        ("processor", f"{told['cpu']}, {told['threads']} threads, library {told['library']}"),
        (
            "date, commit",
            f"{told['date']}, {told['commit'][:12]}" + " and changes" * bool(told["changed_files"]),
        ),
        ("load average, before and after", f"{told['load_before'][0]:.2f}, {told['load_after'][0]:.2f}"),
        ("calls that the kernel did not interrupt", f"{statistics.mean(quiet):.0%}"),
        ("copy, read and written", _rates(results.copies)),
        ("read", _rates(results.reads)),
        ("arena", _arena(told)),
    )
    return Grid("Machine", ("", "what it is"), rows)


def _arena(told: dict[str, Any]) -> str:
    size, huge = (told[name] / 2**20 for name in ("arena_bytes", "huge_bytes"))
    return (
        f"{size:.0f} MiB, {told['page_bytes'] // 1024} KiB pages, of the process {huge:.0f} MiB in huge ones"
    )


def _rates(values: list[float]) -> str:
    return " / ".join(f"{value / 1e9:.1f}" for value in values) + " GB/s during the run"


def _summary(results: Results) -> Grid:
    rows = []
    for name in SIZES:
        ratios, ordered = results.ratios(name), results.ratios(name, IN_ORDER)
        rows.append(
            (
                name,
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{statistics.median(ordered):.2f}",
                *(f"{max(results.unused(name, workload)):.1%}" for workload in WORKLOADS),
            )
        )
    head = (
        *("block", "decode, contiguous = 1", "all shapes", f"{IN_ORDER} = 1"),
        *(f"unused, {workload}" for workload in WORKLOADS),
    )
    return Grid("By size: speed in the median shape, memory of the worst model", head, tuple(rows))


def _decode(results: Results) -> Grid:
    copy = results.copy_bytes_per_s
    rows = tuple(
        (
            _shape(one),
            *(f"{one.ratio(name):.2f}" for name in OTHERS),
            f"{one.bandwidth(CONTIGUOUS) / 1e9:.1f} GB/s",
            f"{one.bandwidth('16 KiB') / 1e9:.1f} GB/s, {one.bandwidth('16 KiB') / copy:.0%}",
        )
        for one in results.decode()
    )
    best = (f"{CONTIGUOUS}, best call", "16 KiB, best call, of the best copy")
    head = ("context, head size, group", *OTHERS, *best)
    return Grid("Decode attention: speed where contiguous = 1, and KV read per second", head, rows)


def _shape(one: Measured) -> str:
    return f"{one.context:,}, {one.head_dim}, {one.group}"


def _prefill(results: Results) -> Grid:
    rows = tuple(
        (
            f"{one.head_dim}, {one.group}",
            f"{1e6 * one.seconds(CONTIGUOUS) / one.tokens:.1f} µs",
            *(f"{one.ratio(name):.2f}" for name in OTHERS),
        )
        for one in results.measured
        if one.kind == "prefill"
    )
    head = ("head size, group", f"{CONTIGUOUS}, per token and layer", *OTHERS)
    title = f"Prefill of {CHUNK} tokens after {HISTORY:,}: time, and speed where contiguous = 1"
    return Grid(title, head, rows)


def _waste(results: Results) -> Grid:
    rows = []
    for one in results.waste:
        if one.layout == CONTIGUOUS:
            same = [x for x in results.waste if (x.model, x.workload) == (one.model, one.workload)]
            parts = {x.layout: f"{x.unused:.1%} ({x.unused_bytes / 2**20:,.1f} MiB)" for x in same}
            rows.append(
                (
                    f"{one.workload} ({one.tokens:,.0f})",
                    one.model,
                    *(parts[name] for name in SIZES),
                    f"{one.unused:.0%}",
                )
            )
    head = ("lengths (mean)", "model", *SIZES, f"{CONTIGUOUS}, {LONGEST:,} reserved")
    return Grid("Held and unused: part of a running sequence's memory", head, tuple(rows))


def _tables(results: Results) -> Grid:
    rows = []
    for one in results.tables:
        if one.layout == next(iter(SIZES)):
            same = {x.layout: x for x in results.tables if x.model == one.model}
            rows.append(
                (
                    one.model,
                    *(
                        f"{x.tokens}; {x.table_bytes / 1024:.0f} KiB; {x.table_bytes / x.kv_bytes:.3%}; "
                        f"{1e6 * x.pool_s / POOL_SEQUENCES:.0f} µs"
                        for x in (same[name] for name in SIZES)
                    ),
                )
            )
    title = (
        f"Tokens of a block; table of a sequence of {LONGEST:,} tokens, and its part of what a step reads; "
        f"to allocate and free {POOL_TOKENS:,} tokens"
    )
    return Grid(title, ("model", *SIZES), tuple(rows))


def plot(results: Results, path: Path) -> None:
    """Speed and unused memory by size; the format follows from the file's name."""
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes = [size // 1024 for size in SIZES.values()]
    for group in sorted({one.group for one in results.decode()}):
        shapes = [one for one in results.decode() if one.group == group]
        middle = [statistics.median(one.ratio(name) for one in shapes) for name in SIZES]
        least = [min(one.ratio(name) for one in shapes) for name in SIZES]
        most = [max(one.ratio(name) for one in shapes) for name in SIZES]
        speed.plot(sizes, middle, marker="o", label=f"query heads of a KV head: {group}")
        speed.fill_between(sizes, least, most, alpha=0.12)
    speed.axhline(1, color="grey", linewidth=0.8)
    speed.set(title="decode attention", ylabel="speed, contiguous = 1", xlabel="KiB of a block", ylim=0)
    for model in dict.fromkeys(one.model for one in results.waste):
        rows = {x.layout: x.unused for x in results.waste if (x.model, x.workload) == (model, "ShareGPT")}
        memory.plot(sizes, [100 * rows[name] for name in SIZES], marker="o", label=model)
    memory.set(title="held and unused, ShareGPT lengths", ylabel="% of held memory", xlabel="KiB of a block")
    memory.set_ylim(0)
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
