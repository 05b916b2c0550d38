"""`muxserve place`: compute a placement and print it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress

from muxserve.cli.placement_plots import obstacle, plot_placement
from muxserve.cli.tables import print_table
from muxserve.placement.solver.baselines import greedy, spatial
from muxserve.placement.solver.best import best
from muxserve.placement.solver.cost import CostError, CostModel, read_costs
from muxserve.placement.solver.equations import equation_1
from muxserve.placement.solver.objective import Objective, as_state
from muxserve.placement.solver.paper import paper
from muxserve.placement.solver.placement import InvalidPlacement, Placement
from muxserve.placement.solver.roofline import Costs, Roofline
from muxserve.placement.solver.workload import Workload, WorkloadError, read_workload
from muxserve.sim.judge import judge

BAD_USAGE, NO_PLACEMENT = 2, 1
RESERVE = 6.0
"""Seconds of the time limit that are kept for starting processes and writing the answer."""


def read_inputs(workload_path: Path, cost_path: Path) -> tuple[Workload, Costs]:
    """Workload and costs, predicted for models that the table lacks. Exit: one of them cannot be read."""
    try:
        workload = read_workload(workload_path)
        table = read_costs(cost_path)
    except (WorkloadError, CostError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_USAGE) from None
    shapes = {model.model: model.shape for model in workload.models}
    return workload, Costs(table, frozenset(table.models), Roofline(shapes))


def run(
    workload_path: Path, cost_path: Path, algorithm: str, time_limit: float, form: str, plot: Path | None
) -> int:
    """Print the placement; the exit code."""
    if problem := obstacle(plot):
        typer.echo(f"error: {problem}", err=True)
        return BAD_USAGE
    workload, costs = read_inputs(workload_path, cost_path)
    began = time.monotonic()
    placement = compute(workload, costs, algorithm, time_limit)
    try:
        placement.verify(workload, costs)
    except InvalidPlacement as error:
        for problem in error.problems:
            typer.echo(f"error: {algorithm}: {problem}", err=True)
        return NO_PLACEMENT
    estimate = estimated(placement, workload, costs)
    estimate |= {"algorithm": algorithm, "seconds": round(time.monotonic() - began, 3)}
    placement = replace(placement, estimate=estimate)
    if plot is not None:
        plot_placement(placement, workload, plot)
    if form == "json":
        typer.echo(json.dumps(placement.as_object(), indent=2))
    else:
        _print(placement, workload)
    return 0


def compute(workload: Workload, costs: CostModel, algorithm: str, time_limit: float) -> Placement:
    """Run an algorithm by its name."""
    if algorithm == "best":
        began = time.monotonic()
        limit = max(1.0, time_limit - RESERVE)

        def judged(placements: Any) -> list[float]:
            return judge(placements, workload, costs, limit - (time.monotonic() - began))

        with Progress(console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task("searching", total=1.0)
            return best(
                workload,
                costs,
                limit,
                time.monotonic,
                judged,
                progress=lambda done: bar.update(task, completed=done),
            )
    simple: dict[str, Callable[[Workload, CostModel], Placement]]
    simple = {"paper": paper, "greedy": greedy, "spatial": spatial}
    return simple[algorithm](workload, costs)


def estimated(placement: Placement, workload: Workload, costs: CostModel) -> dict[str, Any]:
    """What is expected of a placement. Rates in requests per second."""
    objective = Objective(workload, costs)
    state = [(mesh, models) for mesh, models in as_state(placement, objective) if models]
    copies = [sum(i in models for _, models in state) for i in range(len(workload.models))]
    served = [0.0] * len(workload.models)
    headrooms = []
    for mesh, models in state:
        forecast = objective.forecast(mesh, [(i, copies[i]) for i in sorted(models)])
        headrooms.append(forecast.headroom)
        for i in models:
            served[i] += workload.models[i].rate / copies[i] * min(1.0, forecast.headroom)
    return {
        "equation_3": equation_1(placement, workload, costs),
        "throughput": sum(served),
        "rate": workload.rate,
        "served": {model.name: rate for model, rate in zip(workload.models, served, strict=True)},
        "headroom": headrooms,
        "gpus_used": placement.gpus,
        "unplaced": [m.name for m, count in zip(workload.models, copies, strict=True) if count == 0],
    }


def _print(placement: Placement, workload: Workload) -> None:
    rates = {model.name: model.rate for model in workload.models}
    copies = {name: sum(name == p.name for u in placement.units for p in u.models) for name in rates}
    headrooms = placement.estimate["headroom"]
    print_table(
        f"placement ({placement.estimate['algorithm']})",
        ("unit", "gpus", "model", "checkpoint", "tp", "rate", "prefill", "decode", "headroom"),
        (
            (
                number if first == 0 else "",
                f"{unit.gpus[0][0]}:{unit.gpus[0][1]}-{unit.gpus[-1][1]}" if first == 0 else "",
                placed.name,
                placed.model,
                placed.tensor_parallel,
                f"{rates[placed.name] / copies[placed.name]:.2f}",
                f"{placed.prefill_share:.0%}",
                f"{placed.decode_share:.0%}",
                f"{headrooms[number]:.2f}" if first == 0 else "",
            )
            for number, unit in enumerate(placement.units)
            for first, placed in enumerate(unit.models)
        ),
    )
    estimate = placement.estimate
    typer.echo(
        f"Equation 3: {estimate['equation_3']:.1f} req/s; expected: {estimate['throughput']:.1f} of "
        f"{estimate['rate']:.1f} req/s; GPUs: {estimate['gpus_used']} of {workload.gpus}; "
        f"{estimate['seconds']:.1f} s"
    )
    if estimate["unplaced"]:
        typer.echo(f"without a place: {', '.join(estimate['unplaced'])}")
