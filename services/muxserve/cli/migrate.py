"""`muxserve plan`, `rebalance`, `load`, `unload`, `pin`, `unpin`, `drain`, `cancel`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from muxserve.cli.calls import FAILED, exit_code
from muxserve.client import (
    AdminClient,
    DrainEvent,
    Migration,
    MigrationEvent,
    MigrationPhase,
    Move,
    Plan,
)

BAD_USAGE = 2


def plan(admin: str, *, as_json: bool) -> int:
    """Print the plan; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            found = client.plan()
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        else:
            _print_plan(found)

    return exit_code(command)


def rebalance(admin: str, moves: Sequence[str], drain_seconds: float | None, *, as_json: bool) -> int:
    """Move models and print what happens; the exit code. A move is "MODEL=WORKER" or "MODEL@FROM=WORKER"."""
    asked = []
    for text in moves:
        path, _, target = text.rpartition("=")
        model, _, source = path.partition("@")
        if not model or not target:
            typer.echo(f"error: --move: expected MODEL=WORKER or MODEL@FROM=WORKER, not {text!r}", err=True)
            return BAD_USAGE
        asked.append(Move(model, target, source))
    return _show(admin, lambda client: client.rebalance(asked, drain_seconds=drain_seconds), as_json)


def load(admin: str, model: str, worker: str, *, as_json: bool) -> int:
    """Load a model and print what happens; the exit code."""
    return _show(admin, lambda client: client.load(model, worker), as_json)


def unload(admin: str, model: str, worker: str, drain_seconds: float | None, *, as_json: bool) -> int:
    """Unload a model and print what happens; the exit code."""
    return _show(admin, lambda client: client.unload(model, worker, drain_seconds=drain_seconds), as_json)


def pin(admin: str, model: str, *, pinned: bool) -> int:
    """Pin a model, or lift that; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            (client.pin if pinned else client.unpin)(model)
        typer.echo(f"{model} is {'' if pinned else 'not '}pinned")

    return exit_code(command)


def drain(admin: str, worker: str, drain_seconds: float | None, *, undo: bool, as_json: bool) -> int:
    """Drain a worker and print what happens, or undo that; the exit code."""

    def command() -> None:
        began = time.monotonic()
        with AdminClient(admin) as client:
            if undo:
                client.undrain(worker)
                typer.echo(f"{worker} may have models again")
                return
            for event in client.drain(worker, drain_seconds=drain_seconds):
                if as_json:
                    typer.echo(json.dumps(dataclasses.asdict(event)))
                else:
                    _print_drain(worker, event, time.monotonic() - began)

    return exit_code(command)


def cancel(admin: str, migration: str) -> int:
    """Cancel; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            found = client.cancel(migration)
        typer.echo(f"rolling back {_way(found)}")

    return exit_code(command)


def _show(admin: str, start: Callable[[AdminClient], Iterator[MigrationEvent]], as_json: bool) -> int:
    """Print events as they come; the exit code: not 0 if something was rolled back."""
    rolled_back = False

    def command() -> None:
        nonlocal rolled_back
        began, any_event = time.monotonic(), False
        with AdminClient(admin) as client:
            for event in start(client):
                any_event = True
                rolled_back |= event.migration.phase is MigrationPhase.ROLLED_BACK
                if as_json:
                    typer.echo(json.dumps(dataclasses.asdict(event)))
                else:
                    _print_event(event, time.monotonic() - began)
        if not any_event and not as_json:
            typer.echo("nothing to do")

    return exit_code(command) or (FAILED if rolled_back else 0)


def _print_event(event: MigrationEvent, seconds: float) -> None:
    typer.echo(f"{seconds:6.2f} s  [{event.ended}/{event.total}]  {_line(event.migration)}")


def _print_drain(worker: str, event: DrainEvent, seconds: float) -> None:
    if event.migration is not None:
        typer.echo(f"{seconds:6.2f} s  {_line(event.migration)}  ({event.held_blocks} blocks held)")
    else:
        left = f"{event.models_left} models, {event.held_blocks} blocks held"
        typer.echo(f"{seconds:6.2f} s  {worker} has {left}")


def _line(migration: Migration) -> str:
    error = f": {migration.error}" if migration.error else ""
    return f"{_way(migration)}  {str(migration.phase).replace('_', ' ')}{error}"


def _way(migration: Migration) -> str:
    match migration.source, migration.target:
        case "", target:
            return f"{migration.model} to {target}"
        case source, "":
            return f"{migration.model} off {source}"
        case source, target:
            return f"{migration.model} from {source} to {target}"


def _print_plan(found: Plan) -> None:
    from muxserve.cli.tables import print_table

    print_table(
        "traffic",
        ("model", "rate", "recent", "burst", "prompt", "output", "waiting"),
        (
            (
                each.model,
                f"{each.rate:.2f}",
                f"{each.recent_rate:.2f}",
                "yes" if each.burst else "",
                f"{each.prompt_tokens:.0f}",
                f"{each.output_tokens:.0f}",
                each.waiting,
            )
            for each in found.traffic
        ),
    )
    rows: list[Sequence[Any]] = [
        (move.model, move.source or "-", move.target or "-", move.reason) for move in found.moves
    ]
    print_table("moves", ("model", "from", "to", "why"), rows)
    typer.echo(
        f"served now: {found.served:.2f} req/s; gain: {found.gain:.2f} req/s; "
        f"cost of moving: {found.cost:.1f} requests"
    )
    typer.echo(f"{'worthwhile' if found.worthwhile else 'not worthwhile'}: {found.reason}")
