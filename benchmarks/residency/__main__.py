"""`python -m benchmarks.residency`: six models where the worker's weights have room for three.

Measured: how long the first request of a sleeping model waits for its first token, with weights read from the
cache on disk and with weights kept in host memory; how many loads and answers there are in a minute when
requests go round all models, one at a time and from all sides at once, beside the most loads there can be;
whether a pinned model is loaded again meanwhile; how many loads come of first requests that come together;
how fast a request is refused that cannot wait. Takes some minutes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine import machine
from benchmarks.engine.contender import ContenderFailed
from benchmarks.engine.lineup import CannotRun
from benchmarks.engine.run import default_model
from benchmarks.online.deployment import Deployment, Setup, copies
from muxserve.client import AsyncClient, ClientOptions, ModelState, Unavailable
from muxserve.placement.residency import PlaceView, Rules, Stage
from muxserve.v1 import admin_pb2, inference_pb2

RESULTS = Path(__file__).parents[1] / "results" / "residency"
NAMES = [f"m{number}" for number in range(6)]
ROOM = 3
SIZE = 330 * 2**20
"""Bytes of weights of which a model takes less, and of which none takes less than half."""
TIMES = 8
"""Wakes, and refusals."""
TOGETHER = 32
"""First requests that come at once."""
PROMPT = [504, 3575, 282, 4649, 314]


class Crowd:
    """A client of a deployment with too many models."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.client = AsyncClient(deployment.gateway, options=ClientOptions(max_retries=0))

    async def places(self) -> list[admin_pb2.PlacedModel]:
        """All of them."""
        placement = await self._deployment.placement()
        return [placed for unit in placement.units for placed in unit.models]

    async def loads(self) -> dict[str, int]:
        """Of each model since the start."""
        return {placed.config.name: placed.loads for placed in await self.places()}

    async def load_seconds(self) -> float:
        """Of a model, in the middle."""
        known = [placed.load_seconds for placed in await self.places()]
        return statistics.median(seconds for seconds in known if seconds)

    async def first_token(self, model: str) -> float:
        """Seconds until it comes."""
        began = time.monotonic()
        async with self.client.stream(
            model, prompt_tokens=PROMPT, max_tokens=2, temperature=0, timeout=600
        ) as stream:
            async for _ in stream:
                break
        return time.monotonic() - began

    async def sleeper(self) -> str:
        """A model that sleeps and has room: what is loaded has had its residency."""
        while True:
            for placed in await self.places():
                if placed.state == inference_pb2.MODEL_STATE_ASLEEP and not placed.room_at_unix_ms:
                    return placed.config.name
            await asyncio.sleep(0.1)

    async def wake(self, times: int) -> dict[str, Any]:
        """Time to first token of models that sleep, and of the same right after."""
        cold, warm = [], []
        for _ in range(times):
            model = await self.sleeper()
            cold.append(await self.first_token(model))
            warm.append(await self.first_token(model))
        return {
            "first_token_asleep": _summary(cold),
            "first_token_ready": _summary(warm),
            "load_seconds": round(await self.load_seconds(), 3),
        }

    async def together(self) -> dict[str, Any]:
        """Many first requests of a model that sleeps, at once."""
        model = await self.sleeper()
        before = (await self.loads())[model]
        waits = await asyncio.gather(*(self.first_token(model) for _ in range(TOGETHER)))
        loads = (await self.loads())[model] - before
        return {"requests": TOGETHER, "loads": loads, "first_token": _summary(waits)}

    async def alternate(self, seconds: float, users: int, pinned: str = "") -> dict[str, Any]:
        """Requests round all models, for a time, while one is pinned or none."""
        waits: dict[str, list[float]] = {name: [] for name in NAMES}
        if pinned:
            await self._pin(pinned, True)
            await self.first_token(pinned)
        before, began, at_first = await self.loads(), time.monotonic(), await self.load_seconds()

        async def user(number: int) -> None:
            at = number * len(NAMES) // users
            while time.monotonic() - began < seconds:
                name = NAMES[at % len(NAMES)]
                waits[name].append(await self.first_token(name))
                at += 1

        await asyncio.gather(*(user(number) for number in range(users)))
        minutes, after = (time.monotonic() - began) / 60, await self.loads()
        loads = {name: after[name] - before[name] for name in NAMES}
        load_seconds = await self.load_seconds()
        if pinned:
            await self._pin(pinned, False)
        return {
            "users": users,
            "pinned": pinned,
            "loads": loads,
            "loads_per_minute": round(sum(loads.values()) / minutes, 2),
            "most_loads_per_minute": round(_most(min(at_first, load_seconds), ROOM - bool(pinned)), 2),
            "load_seconds": round(load_seconds, 3),
            "answers_per_minute": round(sum(map(len, waits.values())) / minutes, 2),
            "first_token": {name: _summary(each) for name, each in waits.items()},
        }

    async def _pin(self, model: str, pinned: bool) -> None:
        request = admin_pb2.SetPinnedRequest(model=model, pinned=pinned)
        await self._deployment.stub.SetPinned(request, timeout=10)

    async def refuse(self, times: int) -> dict[str, Any]:
        """How long it takes to be told that a request cannot be served in time."""
        took: list[float] = []
        expected: list[float] = []
        while len(took) < times:
            model = next(m for m in await self.client.models() if m.state is ModelState.ASLEEP)
            began = time.monotonic()
            try:
                await self.client.generate(
                    model.name, prompt_tokens=PROMPT, max_tokens=1, timeout=model.expected_wait / 2
                )
            except Unavailable as error:
                took.append(time.monotonic() - began)
                expected.append(error.retry_after or 0.0)
        return {"refused_after": _summary(took), "expected_wait": _summary(expected)}


async def measure(checkpoint: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """All of it. `seconds`: of each alternating load."""
    found: dict[str, Any] = {"room": ROOM, "models": len(NAMES)}
    checkpoints = copies(checkpoint, NAMES, folder / "models")
    # Room for those that sleep, and for one that goes to sleep before another one wakes.
    for kept, host_budget in (("disk", 0), ("host memory", (len(NAMES) - ROOM + 1) * SIZE)):
        chosen = {"weight_host_budget": host_budget, "weight_cache": folder / "cache"}
        options = tuple(f"--set=worker.{key}={value}" for key, value in chosen.items())
        setup = Setup(checkpoints, ROOM * SIZE, 256 * 2**20, workers=1, cores=None, options=options)
        deployment = await Deployment.start(setup, folder / kept.replace(" ", "-"))
        try:
            crowd = Crowd(deployment)
            for name in NAMES:  # what was dequantised is kept now
                await crowd.first_token(name)
            found[kept] = {"wake": await crowd.wake(TIMES), "refusal": await crowd.refuse(TIMES)}
            found[kept]["first requests together"] = await crowd.together()
            for users, pinned in ((1, ""), (len(NAMES), ""), (len(NAMES), NAMES[0])):
                name = f"alternating, {users}" + (", one pinned" if pinned else "")
                found[kept][name] = await crowd.alternate(seconds, users, pinned)
            await crowd.client.close()
        finally:
            await deployment.close()
        sys.stderr.write(f"{kept}: {json.dumps(found[kept])}\n")
    return found


def _most(load_seconds: float, room: int) -> float:
    """Loads per minute of models that take so long to load, in room for so many: what `Rules` allow."""
    place = PlaceView("", "", Stage.READY, 1, load_seconds)
    return room * (2 + 120 / Rules().residency(place))


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {"median": round(statistics.median(seconds), 4), "worst": round(max(seconds), 4)}


def main() -> int:
    """Exit code 1 where it cannot be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.residency", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint, copied for each model; default: the demo's")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each alternating load")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for residency.json")
    arguments = parser.parse_args()
    try:
        environment, others = machine.describe(), machine.Others([os.getpid()])
        with TemporaryDirectory(prefix="muxserve-residency-") as folder:
            checkpoint = arguments.model or default_model()
            found = asyncio.run(measure(checkpoint, Path(folder), arguments.seconds))
    except (ContenderFailed, CannotRun) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    found = {"environment": environment | {"other_cores": round(others.cores(), 3)}} | found
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "residency.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
