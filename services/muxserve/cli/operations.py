"""The commands that change what runs where: plan, rebalance, load, unload, pin, unpin, drain and cancel."""

from __future__ import annotations

from typing import Annotated

import typer

from muxserve.cli.defaults import DEFAULT_ADMIN, Admin, Json

Model = Annotated[str, typer.Argument(help="Model.")]
Worker = Annotated[str, typer.Argument(help="Id of the worker, as `muxserve status` shows it.")]
DrainSeconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds that sequences have to finish before they go on elsewhere. Default: as configured.",
        min=0,
    ),
]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (plan, rebalance, load, unload, pin, unpin, drain, cancel):
        app.command()(command)


def plan(json: Json = False, admin: Admin = DEFAULT_ADMIN) -> None:
    """Show which moves would serve the traffic of now better, and by how much. Changes nothing."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.plan(admin, as_json=json))


def rebalance(
    move: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=WORKER",
            help="Move MODEL to WORKER; MODEL@FROM=WORKER where it is on several; repeatable, in order. "
            "Default: what `muxserve plan` says, if that is worthwhile.",
        ),
    ] = None,
    drain_seconds: DrainSeconds = None,
    json: Json = False,
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Move models to other workers, one after the other, and show what happens.

    The exit code is not 0 if a move was rolled back. Ctrl-C stops the showing, not the moves: see `cancel`.
    """
    from muxserve.cli import migrate as command

    raise typer.Exit(command.rebalance(admin, move or [], drain_seconds, as_json=json))


def load(model: Model, worker: Worker, json: Json = False, admin: Admin = DEFAULT_ADMIN) -> None:
    """Load a model on one more worker, or wake it there."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.load(admin, model, worker, as_json=json))


def unload(
    model: Model,
    worker: Annotated[str, typer.Argument(help="Id of the worker. Default: the only one that has it.")] = "",
    drain_seconds: DrainSeconds = None,
    json: Json = False,
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Take a model off a worker. Where that is its only place it sleeps there: the next request wakes it."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.unload(admin, model, worker, drain_seconds, as_json=json))


def pin(model: Model, admin: Admin = DEFAULT_ADMIN) -> None:
    """Never put a model to sleep, and move it only by hand."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.pin(admin, model, pinned=True))


def unpin(model: Model, admin: Admin = DEFAULT_ADMIN) -> None:
    """Lift what `pin` or the configuration says."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.pin(admin, model, pinned=False))


def drain(
    worker: Worker,
    undo: Annotated[bool, typer.Option("--undo", help="Let it have models again.")] = False,
    drain_seconds: DrainSeconds = None,
    json: Json = False,
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Have all models leave a worker, and show what happens until it has none. It gets none until --undo."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.drain(admin, worker, drain_seconds, undo=undo, as_json=json))


def cancel(
    migration: Annotated[str, typer.Argument(help="Id of the migration. Default: the one under way.")] = "",
    admin: Admin = DEFAULT_ADMIN,
) -> None:
    """Roll back the migration under way, and drop those that are to follow it."""
    from muxserve.cli import migrate as command

    raise typer.Exit(command.cancel(admin, migration))
