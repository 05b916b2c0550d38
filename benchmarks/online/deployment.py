"""`Deployment`: two workers of one core each behind `muxserve up`, and what placement says of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
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

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.Task[None], ready: Any) -> None:
        self._process = process
        self._reader = reader
        self.gateway: str = ready["gateway"]
        self.admin: str = ready["admin"]
        self._channel = grpc.aio.insecure_channel(self.admin)
        self.stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    @classmethod
    async def start(cls, setup: Setup, folder: Path) -> Self:
        """Raises ContenderFailed."""
        _make(folder)
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "muxserve.cli.child", f"{os.getpid()}", "-m", "muxserve.cli.main"]
        command += ["up", "--port", "0", "--admin-port", "0", "--workers", f"{setup.workers}"]
        command += ["--arena", f"{setup.arena}", "--weight-budget", f"{setup.weight_budget}"]
        command += ["--policy", setup.policy]
        if setup.cores is not None:
            command += ["--cores", f"{setup.cores * setup.workers}"]
        command += ["--run-dir", f"{folder / 'run'}", "--ready-file", f"{ready}"]
        command += ["--set", f"placement.rebalance={json.dumps(setup.rebalance)}", *setup.options]
        for name, path in setup.checkpoints.items():
            command += ["--model", f"{name}={path},dtype=bfloat16"]
        with (folder / "errors.log").open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_LIMIT):
                async for line in process.stdout:
                    if line.split()[:1] == [b"gateway"]:
                        break
                else:
                    said = (folder / "errors.log").read_text().strip()[-2000:]
                    raise ContenderFailed(f"muxserve up: {said or 'it has ended'}")
        except BaseException:
            await _end(process)
            raise
        drained = asyncio.create_task(_drain(process.stdout))
        return cls(process, drained, json.loads(ready.read_text()))

    async def placement(self) -> admin_pb2.Placement:
        """The one in force."""
        return (await self.stub.GetPlacement(admin_pb2.GetPlacementRequest(), timeout=10)).placement

    async def loaded(self) -> dict[str, set[str]]:
        """Workers by model that is ready there."""
        found: dict[str, set[str]] = {}
        for unit in (await self.placement()).units:
            for placed in unit.models:
                at = found.setdefault(placed.config.name, set())
                if placed.state == inference_pb2.MODEL_STATE_READY:
                    at.add(unit.worker_id)
        return found

    async def arrange(self, wanted: Mapping[str, set[str]]) -> None:
        """Load and unload by hand until models are where they are wanted. Raises ContenderFailed."""
        end = time.monotonic() + MOVE_LIMIT
        while (loaded := await self.loaded()) != wanted:
            if time.monotonic() > end:
                raise ContenderFailed(f"the placement is {loaded}, and was to be {wanted}")
            with suppress(grpc.aio.AioRpcError):
                await self._arrange(loaded, wanted)
            await asyncio.sleep(LOOK)

    async def _arrange(self, loaded: Mapping[str, set[str]], wanted: Mapping[str, set[str]]) -> None:
        """Replicas that are not wanted make room first."""
        for model, at in loaded.items():
            for worker in sorted(at - wanted[model]) if at & wanted[model] else ():
                request = admin_pb2.AdminServiceUnloadModelRequest(
                    model=model, worker=worker, drain_seconds=0
                )
                await _finish(self.stub.UnloadModel(request, timeout=MOVE_LIMIT))
                return
        for model, at in loaded.items():
            for target in sorted(wanted[model] - at):
                source = next(iter(sorted(at - wanted[model])), "")
                if source:
                    move = admin_pb2.Move(model=model, source_worker=source, target_worker=target)
                    rebalance = admin_pb2.RebalanceRequest(moves=[move], drain_seconds=0)
                    await _finish(self.stub.Rebalance(rebalance, timeout=MOVE_LIMIT))
                else:
                    load = admin_pb2.AdminServiceLoadModelRequest(model=model, worker=target)
                    await _finish(self.stub.LoadModel(load, timeout=MOVE_LIMIT))
                return

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
        below = tree(self._process.pid)
        await self._channel.close()
        await _end(self._process)
        await self._reader
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


def _make(folder: Path) -> None:
    folder.mkdir(parents=True)


async def _finish(call: Any) -> None:
    async for _ in call:
        pass


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(20):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
