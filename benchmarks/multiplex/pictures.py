"""What was measured, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.multiplex.skew import Skew


def _pyplot() -> Any:
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def plot_skew(measured: Sequence[Skew], path: Path) -> None:
    """Goodput and saturated throughput by α; each system a bar. Goodput's whisker ends at what failed."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(dict.fromkeys(cell.system for cell in measured[0].saturated))
    places = np.arange(len(measured))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = places + (number - (len(names) - 1) / 2) * width
        found = [skew.goodputs.get(name) for skew in measured]
        rates = [np.nan if one is None else one.rate for one in found]  # not searched: no bar
        above = [0.0 if one is None or one.below is None else one.below - one.rate for one in found]
        axes[0].bar(at, rates, width, yerr=(np.zeros(len(rates)), above), capsize=2, label=name)
        axes[1].bar(at, [skew.throughput(name) for skew in measured], width, label=name)
    axes[0].set(title="goodput: highest rate with 99% within the SLO", ylabel="requests/s")
    axes[1].set(title="saturated throughput, no deadlines", ylabel="output tokens/s")
    for each in axes:
        each.set_xlim(-0.5, len(measured) - 0.5)
        each.set_xticks(places, [f"alpha {skew.alpha:g}" for skew in measured])
        each.grid(alpha=0.3, axis="y")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    _save(figure, path)


def plot_loads(skew: Skew, path: Path) -> None:
    """Attainment, worst model and latencies over load, at one α."""
    figure, axes = _pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    loads = sorted(skew.cells)
    names = list(dict.fromkeys(cell.system for cells in skew.cells.values() for cell in cells))
    for name in names:
        cells = [next((cell for cell in skew.cells[load] if cell.system == name), None) for load in loads]
        known = [(load, cell.report) for load, cell in zip(loads, cells, strict=True) if cell is not None]
        x = [load for load, _ in known]
        axes[0].plot(
            x, [100 * list(one.total.attainment.values())[-1] for _, one in known], marker="o", label=name
        )
        axes[1].plot(
            x, [100 * (skew.worst_attainment(name, load) or 0) for load in x], marker="o", label=name
        )
        axes[2].plot(x, [one.total.ttft.p99 for _, one in known], marker="o", label=name)
    axes[0].set(title=f"met the SLO, alpha {skew.alpha:g}", ylabel="% of requests", ylim=(0, 103))
    axes[1].set(title="met the SLO, worst model", ylabel="% of its requests", ylim=(0, 103))
    axes[2].set(title="time to first token, P99", ylabel="seconds", yscale="log")
    for each in axes:
        each.set_xlabel("load, parts of " + skew.ours + "'s saturated throughput")
        each.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    _save(figure, path)


def plot_overload(found: dict[str, Any], path: Path) -> None:
    """Overload in time: what arrived, was answered and refused; memory."""
    figure, (rates, memory) = _pyplot().subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    columns = found["outcomes"]
    at, end, status = (np.array(columns[name]) for name in ("at", "end", "status"))
    edges = np.arange(0, np.ceil(end.max()) + 1)
    for name, moments in {
        "arrived": at,
        "answered": end[status == "ok"],
        "refused": end[status == "refused"],
        "late": end[status == "late"],
    }.items():
        rates.plot(edges[:-1] + 0.5, np.histogram(moments, edges)[0], label=name, linewidth=0.9)
    rates.set(title="overload", xlabel="seconds", ylabel="requests per second", ylim=0)
    rates.legend(fontsize="small")
    memory.plot(
        [when for when, _ in found["memory"]], [size / 2**20 for _, size in found["memory"]], marker="."
    )
    memory.set(title="memory of all processes", xlabel="seconds", ylabel="MiB", ylim=0)
    for each in (rates, memory):
        each.grid(alpha=0.3)
    _save(figure, path)
