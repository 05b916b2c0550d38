"""Pictures of placements and simulations. Needs matplotlib, which nothing else of the command line does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from muxserve.placement.solver.placement import Placement
from muxserve.placement.solver.workload import Workload
from muxserve.sim.report import SCALES, SLO_SCALE, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")


def obstacle(path: Path | None) -> str:
    """Why no picture can be written there, or nothing; known before anything is computed."""
    if path is None:
        return ""
    if path.suffix.lower() not in SUFFIXES:
        return f"--plot: {path} does not end in {', '.join(SUFFIXES)}"
    if not path.absolute().parent.is_dir():
        return f"--plot: no directory {path.absolute().parent}"
    return "" if find_spec("matplotlib") else "--plot: needs matplotlib: pip install muxserve[bench]"


def plot_placement(placement: Placement, workload: Workload, path: Path) -> None:
    """Nodes as rows, GPUs as columns, a box for each unit with its models."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(node.gpus for node in workload.nodes)
    rates = {model.name: model.rate for model in workload.models}
    busiest = max([*rates.values(), 1e-9])
    rows = len(workload.nodes)
    tallest = max((len(unit.models) for unit in placement.units), default=1)
    figure = Figure(figsize=(2 + 1.5 * columns, 1 + rows * max(1.0, 0.28 * tallest)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["YlOrRd"]
    for unit in placement.units:
        node, first = unit.gpus[0]
        load = max((rates[placed.name] for placed in unit.models), default=0.0) / busiest
        box = Rectangle(
            (first + 0.03, node - 0.46), len(unit.gpus) - 0.06, 0.92, fc=colours(0.1 + 0.6 * load), ec="k"
        )
        axes.add_patch(box)
        text = "\n".join(f"{placed.name} ({placed.model})" for placed in unit.models)
        axes.text(first + len(unit.gpus) / 2, node, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, columns), ylim=(rows - 0.5, -0.5), xlabel="GPU", ylabel="node")
    axes.set_yticks(range(rows))
    axes.set_xticks(range(columns + 1))
    axes.set_title("units; darker: the most popular model's rate is higher")
    figure.savefig(path, dpi=120)


def plot_report(result: Report, path: Path) -> None:
    """Attainment over SLO scales, and what each model is served."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _attainment(result, left)
    _served(result, right)
    figure.savefig(path, dpi=120)


def _attainment(result: Report, axes: Axes) -> None:
    def line(values: object) -> list[float]:
        assert isinstance(values, dict)
        return [100 * values[str(scale)] for scale in SCALES]

    for model in result.models.values():
        axes.plot(SCALES, line(model.attainment), color="0.8", linewidth=1)
    if result.worst:
        axes.plot(
            SCALES, line(result.models[result.worst].attainment), "C3--", label=f"worst: {result.worst}"
        )
    axes.plot(SCALES, line(result.total.attainment), "C0o-", label="all requests")
    axes.set(xlabel="SLO scale", ylabel="requests that meet their SLO, %", ylim=(0, 103))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _served(result: Report, axes: Axes) -> None:
    names = list(result.models)
    axes.bar(names, [model.rate for model in result.models.values()], color="0.85", label="arrived")
    axes.bar(names, [model.throughput for model in result.models.values()], width=0.5, label="served")
    axes.plot(
        names,
        [model.attainment[str(SLO_SCALE)] * model.rate for model in result.models.values()],
        "k_",
        markersize=14,
        label=f"within {SLO_SCALE} x its time alone",
    )
    axes.set(ylabel="requests per second")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
