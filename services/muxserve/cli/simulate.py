"""`muxserve simulate`: what a placement would do, in simulated time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from muxserve.cli.place import BAD_USAGE, read_inputs
from muxserve.cli.placement_plots import obstacle, plot_report
from muxserve.cli.tables import print_table
from muxserve.placement.solver.placement import InvalidPlacement, parse_placement
from muxserve.scheduler.policy import POLICIES
from muxserve.sim.arrivals import TraceError, poisson, read_trace
from muxserve.sim.cluster import SimOptions, simulate
from muxserve.sim.report import SLO_SCALE, ModelReport, Report, report


def run(
    workload_path: Path,
    cost_path: Path,
    placement_path: Path,
    policy: str,
    duration: float,
    seed: int,
    form: str,
    plot: Path | None,
    trace: Path | None,
) -> int:
    """Print the report; the exit code."""
    if policy not in POLICIES:
        return _wrong(f'--policy: no policy named "{policy}"; there are {", ".join(sorted(POLICIES))}')
    if problem := obstacle(plot):
        return _wrong(problem)
    workload, costs = read_inputs(workload_path, cost_path)
    try:
        placement = parse_placement(placement_path.read_text())
        placement.verify(workload, costs)
        arrivals = poisson(workload, duration, seed) if trace is None else read_trace(trace, workload)
    except InvalidPlacement as error:
        return _wrong(*(f"{placement_path}: {problem}" for problem in error.problems))
    except (OSError, UnicodeDecodeError, TraceError) as error:
        return _wrong(str(error))
    arrivals = [arrival for arrival in arrivals if arrival.time <= duration]
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(f"simulating {len(arrivals)} requests", total=1.0)
        outcome = simulate(
            placement,
            workload,
            costs,
            arrivals,
            duration,
            SimOptions(policy=policy).of_service(costs.service),
            lambda done: bar.update(task, completed=done),
        )
    result = report(outcome, placement, workload, costs)
    if plot is not None:
        plot_report(result, plot)
    if form == "json":
        head = {"policy": policy, "duration": duration, "seed": seed}
        typer.echo(json.dumps(head | result.as_object(), indent=2))
    else:
        _print(result, policy)
    return 0


def _wrong(*messages: str) -> int:
    for message in messages:
        typer.echo(f"error: {message}", err=True)
    return BAD_USAGE


def _print(result: Report, policy: str) -> None:
    columns = ("model", "arrived", "req/s", "served", "tokens/s", "ttft", "p99", "tpot", "p99", "e2e", "p99")
    rows = [(name, *_row(model)) for name, model in result.models.items()]
    rows.append(("all", *_row(result.total)))
    print_table(f"{policy}: seconds, means and P99", (*columns, f"SLO x{SLO_SCALE}"), rows)
    worst = result.worst
    typer.echo(f"worst model: {worst or 'none'}; GPUs used: {result.gpus}; preemptions: {result.preemptions}")


def _row(model: ModelReport) -> tuple[str, ...]:
    return (
        str(model.requests),
        f"{model.throughput:.2f}",
        f"{model.served:.0%}",
        f"{model.token_throughput:.0f}",
        f"{model.ttft.mean:.2f}",
        f"{model.ttft.p99:.2f}",
        f"{model.tpot.mean:.3f}",
        f"{model.tpot.p99:.3f}",
        f"{model.latency.mean:.1f}",
        f"{model.latency.p99:.1f}",
        f"{model.attainment[str(SLO_SCALE)]:.1%}",
    )
