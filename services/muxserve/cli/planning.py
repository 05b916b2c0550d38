"""The commands that plan: place and simulate, which need files and no deployment, and profile, which makes
one of those files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Workload = Annotated[
    Path, typer.Option(help="YAML: cluster, models with rates, mean lengths (docs/placement.md).")
]
Cost = Annotated[Path, typer.Option(help="JSON table of job times, as `muxserve profile` writes it.")]
Format = Annotated[Literal["table", "json"], typer.Option(help="What to print.")]
Plot = Annotated[Path | None, typer.Option(help="Write a picture there (PNG, PDF or SVG).")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(place)
    app.command()(simulate)
    app.command()(profile)


def place(
    workload: Workload,
    cost: Cost,
    algorithm: Annotated[
        Literal["paper", "greedy", "spatial", "best"], typer.Option(help="How to place.")
    ] = "best",
    time_limit: Annotated[float, typer.Option(help="Seconds that best may take.", min=2)] = 90.0,
    format: Format = "table",
    plot: Plot = None,
) -> None:
    """Compute which models live together on which GPUs."""
    from muxserve.cli import place as command

    raise typer.Exit(command.run(workload, cost, algorithm, time_limit, format, plot))


def simulate(
    workload: Workload,
    cost: Cost,
    placement: Annotated[Path, typer.Option(help="JSON, as `muxserve place --format json` prints it.")],
    policy: Annotated[str, typer.Option(help="Scheduling policy of every unit.")] = "adbs",
    duration: Annotated[float, typer.Option(help="Seconds in which requests arrive.", min=1)] = 120.0,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    format: Format = "table",
    plot: Plot = None,
    trace: Annotated[
        Path | None, typer.Option(help="Requests from JSON lines (time, model, prompt, output), not drawn.")
    ] = None,
) -> None:
    """Simulate a placement under a workload: throughput, latencies, and how many requests meet their SLO."""
    from muxserve.cli import simulate as command

    raise typer.Exit(command.run(workload, cost, placement, policy, duration, seed, format, plot, trace))


def profile(
    output: Annotated[Path, typer.Option(help="Where the table is written.")],
    model: Annotated[list[str] | None, typer.Option(help="Model; repeatable. Default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once; repeatable.", min=1)] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt; repeatable.", min=1)] = None,
    repeat: Annotated[int, typer.Option(help="Measurements of each, of which the median counts.", min=1)] = 3,
    address: Annotated[
        str, typer.Option(envvar="MUXSERVE_ADDRESS", help="host:port of the gateway.")
    ] = "127.0.0.1:8600",
    admin: Annotated[
        str, typer.Option(envvar="MUXSERVE_ADMIN", help="host:port of the placement service.")
    ] = "127.0.0.1:8601",
) -> None:
    """Measure the job times of a running deployment that has nothing else to do, for place and simulate."""
    from muxserve.cli import profile as command

    batches, lengths = batch or [1, 2, 4, 8, 16, 32], length or [32, 128, 512]
    raise typer.Exit(command.run(address, model or [], batches, lengths, repeat, output, admin))
