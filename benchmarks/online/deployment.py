"""`Deployment`: two workers of one core each behind `muxserve up`, and what placement says of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import psutil

from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.machine import tree
from benchmarks.online.arrangement import Loaded, next_move
from benchmarks.serving import Serving
from muxserve.placement.advisor_situation import Move
from muxserve.v1 import admin_pb2, admin_pb2_grpc, inference_pb2

READY_LIMIT = 300.0
MOVE_LIMIT = 120.0
LOOK = 0.1
"""Seconds between looks at the placement."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is started."""

    checkpoints: Mapping[str, Path]
    """By model; each a file of its own, so that weights are not shared."""
    weight_budget: int
    """Bytes, of each worker."""
    arena: int
    workers: int = 2
    cores: int | None = 1
    """Of each worker. None: all that there are, divided among them."""
    rebalance: str = "auto"
    policy: str = "mux"
    options: tuple[str, ...] = ()
    """Further ones of `muxserve up`."""


def copies(checkpoint: Path, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A file of the same content for each name: a checkpoint of its own to the workers."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        found[name] = folder / f"{name}{checkpoint.suffix}"
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, found[name])
            continue
        try:
            os.link(checkpoint, found[name])
        except OSError:
            shutil.copyfile(checkpoint, found[name])
    return found


class Deployment:
    """To be closed."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.gateway: str = serving.ready["gateway"]
        self.admin: str = serving.ready["admin"]
        self.redis: str = serving.ready["redis"]
        self._channel = grpc.aio.insecure_channel(self.admin)
        self.stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    @classmethod
    async def start(cls, setup: Setup, folder: Path) -> Self:
        """Raises ContenderFailed."""
        options = ["--workers", f"{setup.workers}", "--arena", f"{setup.arena}"]
        options += ["--weight-budget", f"{setup.weight_budget}", "--policy", setup.policy]
        if setup.cores is not None:
            options += ["--cores", f"{setup.cores * setup.workers}"]
        options += ["--set", f"placement.rebalance={json.dumps(setup.rebalance)}", *setup.options]
        for name, path in setup.checkpoints.items():
            options += ["--model", f"{name}={path},dtype=bfloat16"]
        return cls(await Serving.start("muxserve up", options, folder, READY_LIMIT))

    async def placement(self) -> admin_pb2.Placement:
        """The one in force."""
        return (await self.stub.GetPlacement(admin_pb2.GetPlacementRequest(), timeout=10)).placement

    async def loaded(self) -> dict[str, frozenset[str]]:
        """Workers by model that is ready there."""
        found: dict[str, frozenset[str]] = {}
        for unit in (await self.placement()).units:
            for placed in unit.models:
                ready = placed.state == inference_pb2.MODEL_STATE_READY
                at = frozenset({unit.worker_id} if ready else ())
                found[placed.config.name] = found.get(placed.config.name, frozenset()) | at
        return found

    async def workers(self) -> list[str]:
        """By id."""
        return sorted(unit.worker_id for unit in (await self.placement()).units)

    async def arrange(self, wanted: Loaded, room: int) -> None:
        """Load, move and unload by hand until models are where they are wanted. `room`: models of a worker.
        Raises ContenderFailed."""
        end, problem = time.monotonic() + MOVE_LIMIT, ""
        while (loaded := await self.loaded()) != wanted:
            move = next_move(loaded, wanted, room)
            if time.monotonic() > end:
                raise ContenderFailed(
                    f"models are on {loaded}, and were to be on {wanted}: {problem or move}"
                )
            if move is not None:
                try:
                    await self.move(move)
                except grpc.aio.AioRpcError as error:  # a migration is under way, or ends only now
                    problem = error.details() or ""
            await asyncio.sleep(LOOK)

    async def move(self, move: Move) -> None:
        """At once, without waiting for what runs. Raises AioRpcError."""
        if not move.source:
            load = admin_pb2.AdminServiceLoadModelRequest(model=move.model, worker=move.target)
            await _finish(self.stub.LoadModel(load, timeout=MOVE_LIMIT))
        elif not move.target:
            unload = admin_pb2.AdminServiceUnloadModelRequest(
                model=move.model, worker=move.source, drain_seconds=0
            )
            await _finish(self.stub.UnloadModel(unload, timeout=MOVE_LIMIT))
        else:
            asked = admin_pb2.Move(model=move.model, source_worker=move.source, target_worker=move.target)
            rebalance = admin_pb2.RebalanceRequest(moves=[asked], drain_seconds=0)
            await _finish(self.stub.Rebalance(rebalance, timeout=MOVE_LIMIT))

    async def rebalance(self) -> int:
        """As `muxserve rebalance` does: have done what placement plans, if that is worthwhile; how many
        migrations that were. Raises AioRpcError."""
        call = self.stub.Rebalance(admin_pb2.RebalanceRequest(), timeout=MOVE_LIMIT)
        return len({response.event.migration.id async for response in call})

    async def watch(self, begin: float, history: list[dict[str, Any]]) -> None:
        """Note every change of who serves what and how far migrations are, until cancelled. Times are
        seconds after `begin`, of the monotonic clock."""
        last: Any = None
        while True:
            with suppress(grpc.aio.AioRpcError):
                placement = await self.placement()
                known = _describe(placement)
                if known != last:
                    last = known
                    history.append({"at": round(time.monotonic() - begin, 3), **known})
            await asyncio.sleep(LOOK)

    async def close(self) -> None:
        """End it."""
        below = tree(self._serving.pid)
        await self._channel.close()
        await self._serving.close()
        for left in below:
            with suppress(psutil.NoSuchProcess):
                left.kill()


def _describe(placement: admin_pb2.Placement) -> dict[str, Any]:
    phase = admin_pb2.MigrationPhase.Name
    state = inference_pb2.ModelState.Name
    found: dict[str, Any] = {
        "epoch": placement.epoch,
        "units": {
            unit.worker_id: {
                placed.config.name: state(placed.state).removeprefix("MODEL_STATE_").lower()
                for placed in unit.models
            }
            for unit in placement.units
        },
    }
    if placement.HasField("migration"):
        migration = placement.migration
        found["migration"] = {
            "id": migration.id,
            "model": migration.model,
            "source": migration.source_worker,
            "target": migration.target_worker,
            "phase": phase(migration.phase).removeprefix("MIGRATION_PHASE_").lower(),
            "author": migration.author,
            "reason": migration.reason,
        }
    return found


async def _finish(call: Any) -> None:
    async for _ in call:
        pass
