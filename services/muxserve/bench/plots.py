"""A run as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from muxserve.bench.generator import Run
from muxserve.bench.latency import Slo
from muxserve.bench.outcomes import Status
from muxserve.bench.report import Report
from muxserve.bench.statistics import by, meets


def plot(run: Run, result: Report, slo: Slo | None, path: Path) -> None:
    """Distributions of latencies by model, attainment over SLO scales, and the run in time; PNG."""
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    done = [one for one in run.outcomes if one.status is Status.OK]
    for name, group in by(done, lambda one: one.model).items():
        _distribution(axes[0][0], [one.ttft for one in group], name)
        _distribution(axes[0][1], [one.latency for one in group], name)
    axes[0][0].set(title="time to first token", xlabel="seconds", ylabel="part of answers", xscale="log")
    axes[0][1].set(title="end to end", xlabel="seconds", ylabel="part of answers", xscale="log")
    for each in axes[0]:
        each.xaxis.set_major_formatter("{x:g}")
        each.xaxis.set_minor_formatter("")
    if slo is not None:
        _attainment(axes[1][0], run, slo)
    else:
        names = list(result.models)
        axes[1][0].bar(names, [result.models[name].token_rate for name in names])
        axes[1][0].set(title="output tokens per second", ylabel="tokens/s")
    _timeline(axes[1][1], run)
    for row in axes:
        for each in row:
            each.grid(alpha=0.3)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _distribution(axes: Any, values: list[float | None], name: str) -> None:
    known = sorted(value for value in values if value is not None)
    if known:
        axes.plot(known, np.arange(1, len(known) + 1) / len(known), label=f"{name} ({len(known)})")


def _attainment(axes: Any, run: Run, slo: Slo) -> None:
    scales = np.geomspace(1, slo.scale, 40)
    for name, group in by(run.outcomes, lambda one: one.model).items():
        parts = [100 * sum(meets(one, slo, scale) for one in group) / len(group) for scale in scales]
        axes.plot(scales, parts, label=name)
    axes.axhline(99, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        title="met the SLO",
        xlabel="SLO scale (times unloaded latency)",
        ylabel="% of requests",
        ylim=(0, 102),
    )


def _timeline(axes: Any, run: Run) -> None:
    """Requests that arrived, ended and were refused, per second of the run."""
    last = max((one.end for one in run.outcomes), default=0.0)
    edges = np.arange(0, np.ceil(last) + 1) if last <= 120 else np.linspace(0, last, 120)
    if len(edges) < 2:
        return
    width = edges[1] - edges[0]
    kinds = {
        "arrived": [one.at for one in run.outcomes],
        "answered": [one.end for one in run.outcomes if one.status is Status.OK],
        "refused": [one.end for one in run.outcomes if one.status is Status.REFUSED],
        "late or failed": [one.end for one in run.outcomes if one.status in (Status.LATE, Status.FAILED)],
    }
    for name, moments in kinds.items():
        if moments:
            counted = np.histogram(moments, edges)[0] / width
            axes.plot(edges[:-1] + width / 2, counted, label=name, drawstyle="steps-mid")
    axes.set(title="in time", xlabel="seconds of the run", ylabel="requests per second", ylim=0)
