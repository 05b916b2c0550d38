"""`muxserve status`: everything at a glance. docs/cli.md describes the JSON; fields are only ever added."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import typer

from muxserve.cli.calls import exit_code
from muxserve.client import AdminClient, ModelState, ModelStatus, PlacedModel, Status


def run(admin: str, *, as_json: bool) -> int:
    """Print the status; the exit code."""

    def command() -> None:
        with AdminClient(admin) as client:
            status = client.status()
        if as_json:
            typer.echo(json.dumps(as_object(status), indent=2))
        else:
            _print(as_object(status))

    return exit_code(command)


def as_object(status: Status) -> dict[str, Any]:
    """`status` as the JSON object that `--json` prints."""
    live = {(model.unit, model.model): model for model in status.models}
    placed = [(unit.name, unit.worker_id, model) for unit in status.placement.units for model in unit.models]
    placed += [("", "", model) for model in status.placement.unplaced]
    models = [
        _model(unit, worker, model, live.get((unit, model.config.name))) for unit, worker, model in placed
    ]
    return {
        "epoch": status.placement.epoch,
        "migration": dataclasses.asdict(migration) if (migration := status.placement.migration) else None,
        "planned": [dataclasses.asdict(each) for each in status.placement.planned],
        "drained_workers": list(status.placement.drained_workers),
        "models": sorted(models, key=lambda model: (model["name"], model["unit"])),
        "units": [
            {
                "unit": unit.unit,
                "policy": unit.policy,
                "connected": unit.connected,
                "prefill_jobs": unit.prefill_jobs,
                "decode_jobs": unit.decode_jobs,
            }
            for unit in status.units
        ],
        "pool": [
            {
                "worker": worker.worker_id,
                "block_bytes": worker.pool.block_bytes,
                "total_blocks": worker.pool.total_blocks,
                "free_blocks": worker.pool.free_blocks,
                "cached_blocks": worker.pool.cached_blocks,
                "integrity": worker.pool.integrity_error or "ok",
            }
            for worker in status.workers
        ],
        "executors": [
            {"worker": worker.worker_id, **dataclasses.asdict(executor)}
            for worker in status.workers
            for executor in worker.executors
        ],
        "services": [
            {"kind": service.kind, "id": service.id, "pid": service.pid, "address": service.address}
            for service in status.services
        ],
    }


def _model(unit: str, worker: str, placed: PlacedModel, live: ModelStatus | None) -> dict[str, Any]:
    shape = placed.shape
    return {
        "name": placed.config.name,
        "unit": unit,
        "worker": worker,
        "state": str(placed.state),
        "reason": placed.reason,
        "field": placed.field,
        "dtype": shape.dtype if shape else "",
        "architecture": shape.architecture if shape else "",
        "context_length": shape.context_length if shape else 0,
        "weight_bytes": shape.weight_bytes if shape else 0,
        "loads": placed.loads,
        "load_seconds": placed.load_seconds,
        "expected_wait": _expected_wait(placed),
        "running": live.running if live else 0,
        "waiting": live.waiting if live else 0,
        "blocks_held": live.held_blocks if live else 0,
        "quota_blocks": live.quota_blocks if live else 0,
        "blocks_borrowed": live.borrowed_blocks if live else 0,
        "blocks_peak": live.peak_blocks if live else 0,
        "blocks_cached": live.cached_blocks if live else 0,
        "generated_tokens": live.generated_tokens if live else 0,
        "prefill_tokens": live.prefill_tokens if live else 0,
        "prefix_query_tokens": live.prefix_query_tokens if live else 0,
        "prefix_hit_tokens": live.prefix_hit_tokens if live else 0,
        "preemptions": live.preemptions if live else 0,
    }


def _expected_wait(placed: PlacedModel) -> float | None:
    """Seconds from now on. JSON has no infinity."""
    if placed.state is not ModelState.ASLEEP or math.isinf(placed.expected_wait):
        return None
    return round(placed.expected_wait + max(0.0, placed.room_at - time.time()), 3)


def _print(status: dict[str, Any]) -> None:
    from muxserve.cli.tables import print_table

    columns = {
        "model": "name",
        "unit": "unit",
        "state": "state",
        "dtype": "dtype",
        "running": "running",
        "waiting": "waiting",
        "held": "blocks_held",
        "quota": "quota_blocks",
        "borrowed": "blocks_borrowed",
        "peak": "blocks_peak",
        "cached": "blocks_cached",
        "tokens": "generated_tokens",
        "preempted": "preemptions",
        "loads": "loads",
    }
    models = status["models"]
    print_table(
        f"models (placement {status['epoch']})",
        tuple(columns),
        ([model[key] for key in columns.values()] for model in models),
    )
    for model in models:
        if model["expected_wait"] is not None:
            typer.echo(f"  {model['name']}: asleep, {model['expected_wait']:.1f} s to wake")
        elif model["state"] != "ready" and model["reason"]:
            field = f"{model['field']}: " if model["field"] else ""
            typer.echo(f"  {model['name']}: {field}{model['reason']}")
    if migration := status["migration"]:
        way = f"from {migration['source'] or 'nowhere'} to {migration['target'] or 'nowhere'}"
        typer.echo(f"migration {migration['id']}: {migration['model']} {way}, {migration['phase']}")
    if drained := status["drained_workers"]:
        typer.echo(f"drained: {', '.join(drained)}")
    _print_rows("block pools", status["pool"])
    _print_rows("units", status["units"])
    _print_rows("executors", status["executors"])
    _print_rows("services", status["services"])


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    from muxserve.cli.tables import print_table

    columns = list(rows[0]) if rows else []
    labels = [column.removesuffix("_blocks").replace("_", " ") for column in columns]
    print_table(title, labels, ([row[column] for column in columns] for row in rows))
