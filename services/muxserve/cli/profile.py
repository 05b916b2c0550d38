"""`muxserve profile`: measure a cost table on a running deployment, which should have nothing else to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import typer

from muxserve.cli.calls import exit_code
from muxserve.cli.profile_traffic import Meter, Spent
from muxserve.cli.profiling import Wanted, measure
from muxserve.client import Client
from muxserve.placement.solver.cost import SERVICE
from muxserve.v1 import admin_pb2, admin_pb2_grpc


def run(
    address: str,
    asked: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    repeat: int,
    out: Path,
    admin: str,
) -> int:
    """Measure, and write the table; the exit code."""

    def command() -> None:
        with Client(address) as client:
            contexts = {model.name: model.context_length for model in client.models()}
        names = [name for name in asked or sorted(contexts) if name in contexts]
        if missing := sorted(set(asked) - set(contexts)):
            typer.echo(f"not served, left out: {', '.join(missing)}", err=True)
        described = describe(admin)
        models, lanes = {name: contexts[name] for name in names}, described.get("decode_lanes", 1)
        wanted = Wanted(models, batches, lengths, repeat, company=sorted(contexts), lanes=lanes)
        table = asyncio.run(measure(address, wanted, meter(admin if described else "")))
        table[SERVICE] |= described
        out.write_text(json.dumps(table, indent=1) + "\n")

    return exit_code(command)


def meter(admin: str) -> Meter:
    """Of the units that the placement service there knows of; of none if there is none."""

    async def spent() -> Spent:
        units = (await asyncio.to_thread(_status, admin)).units if admin else ()
        models = [model for unit in units for model in unit.models]
        return Spent(
            sum(unit.decode_jobs for unit in units),
            sum(model.decode_steps for model in models),
            sum(model.decode_seconds for model in models),
            sum(model.prefill_jobs for model in models),
            sum(model.prefill_seconds for model in models),
        )

    return spent


def describe(admin: str) -> dict[str, int]:
    """Cores and slots, if the placement service says so and workers are alike."""
    with suppress(grpc.RpcError):
        workers = _status(admin).workers
        units = {worker.compute_units if worker.device == "cpu" else 0 for worker in workers}
        slots = {model.shape.slots for worker in workers for model in worker.models}
        lanes = {sum(each.kind != "prefill" for each in worker.executors) for worker in workers}
        if len(units) == len(slots) == len(lanes) == 1:
            return {"compute_units": units.pop(), "slots": slots.pop(), "decode_lanes": max(1, lanes.pop())}
    typer.echo(f"{admin} does not say how many cores and slots there are, or they differ", err=True)
    return {}


def _status(admin: str) -> admin_pb2.GetStatusResponse:
    with grpc.insecure_channel(admin) as channel:
        return admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5)
