"""Four models of skewed popularity through all services: multiplexed, and on a static partition.

The same requests, at the same moments, to each policy: Poisson arrivals, lengths drawn once. `mux` is what
the scheduler does by default; `spatial` gives every model its own part of memory and compute, by its rate,
and what one does not use nobody else has; `adbs`, the paper's policy, if there is time. Popularity is that of
the MuxServe paper's synthetic workloads (a power law with exponent 2.1).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.checkpoint import write_checkpoint
from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import TINY_SHAPES, Shape

LLAMA_1B = Shape("Llama-3.2-1B, 384 tokens", 16, 2048, 8192, 32, 8, 64, 384, theta=500_000.0)
POLICIES = ("mux", "spatial", "adbs")
FIRST_SLO, TOKEN_SLO = 1.0, 0.05
"""Seconds to the first token, and from one to the next on average: what a request should keep."""


@dataclass(frozen=True)
class Plan:
    """rate: requests per second, of all models. window: seconds in which they arrive."""

    shape: Shape
    models: int
    rate: float
    window: float
    mean_prompt: float
    mean_new: float
    arena: int
    device: str

    @staticmethod
    def of(context: Context) -> Plan:
        if context.tiny:
            return Plan(TINY_SHAPES[0], 2, 8.0, 1.5, 6.0, 4.0, 16 << 20, "cpu")
        return Plan(LLAMA_1B, 4, 50.0, 10.0, 161.0, 128.0, 1 << 30, context.device)

    def popularity(self) -> list[float]:
        weights = [(rank + 1) ** -2.1 for rank in range(self.models)]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Arrival:
    """One request."""

    at: float
    model: str
    prompt: tuple[int, ...]
    new: int


def trace(plan: Plan) -> list[Arrival]:
    """Always the same. Lengths are lognormal, with sigma 1."""
    chooser = np.random.default_rng(1)

    def length(mean: float, most: int) -> int:
        return int(np.clip(chooser.lognormal(np.log(mean) - 0.5, 1.0), 2, most))

    arrivals = []
    for number, part in enumerate(plan.popularity()):
        at = 0.0
        while (at := at + chooser.exponential(1 / (plan.rate * part))) < plan.window:
            ids = chooser.integers(3, plan.shape.vocabulary, length(plan.mean_prompt, 1024))
            arrivals.append(Arrival(at, f"m{number}", tuple(ids.tolist()), length(plan.mean_new, 512)))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def run(context: Context) -> dict[str, Any]:
    """One policy after another."""
    plan = Plan.of(context)
    arrivals = trace(plan)
    found: dict[str, Any] = {
        "plan": {**vars(plan), "shape": plan.shape.name},
        "popularity": plan.popularity(),
        "requests": len(arrivals),
        "policies": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context.keep(found, "a checkpoint")
        write_checkpoint(plan.shape, folder / "model", context.torch_device)
        for policy in POLICIES[:2] if context.tiny else POLICIES:
            if policy == POLICIES[-1] and not context.enough(3 * plan.window):
                found["left_out"] = policy
                break
            context.keep(found, f"{policy}: starting")
            one: dict[str, Any] = {}
            found["policies"][policy] = one
            try:
                begun = time.perf_counter()
                with _deployment(context, plan, policy, folder) as gateway:
                    one["ready_s"] = time.perf_counter() - begun
                    context.keep(found, f"{policy}: {len(arrivals)} requests")
                    most = max(5.0, min(3 * plan.window, context.left() - 5))
                    one |= asyncio.run(_drive(gateway, arrivals, most, plan))
            except RuntimeError as error:
                one["error"] = str(error)
    context.keep(found)
    return found


@contextmanager
def _deployment(context: Context, plan: Plan, policy: str, folder: Path) -> Iterator[str]:
    """`muxserve up`; the gateway's address. Raises RuntimeError if it does not become ready."""
    worker: dict[str, Any] = {"device": plan.device, "slots": 256}
    if plan.device != "cpu":
        worker["weight_budget"] = 16 << 30
    config = {
        "models": [
            {
                "name": f"m{number}",
                "path": str(folder / "model"),
                "rate": plan.rate * part,
                "max_context": 2048,
            }
            for number, part in enumerate(plan.popularity())
        ],
        "arena": plan.arena,
        "policy": policy,
        "port": 0,
        "admin_port": 0,
        "log_level": "warning",
        "settings": {"worker": worker, "scheduler": {"chunk_tokens": 4096, "lease_steps": 32}},
    }
    file, ready = folder / f"{policy}.json", folder / f"{policy}.ready"
    file.write_text(json.dumps(config))  # JSON is YAML
    # As a child that cannot outlive this process, however it ends.
    command = [sys.executable, "-m", "muxserve.cli.child", str(os.getpid()), "-m", "muxserve.cli.main", "up"]
    command += ["--config", str(file), "--run-dir", f"{folder}/run-{policy}", "--ready-file", str(ready)]
    log = folder / f"{policy}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        limit = threading.Timer(max(20.0, context.left() - 10), process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and line.strip() != "ready":
                pass
            limit.cancel()
            if not line:
                raise RuntimeError(f"muxserve up: {_told(folder / f'run-{policy}', log)}")
            process.stdout.readline()  # printed once the file is there
            yield str(json.loads(ready.read_text())["gateway"])
        finally:
            limit.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _told(run_directory: Path, log: Path) -> str:
    """The ends of its logs."""
    files = [log, *sorted((run_directory / "logs").glob("*"))]
    return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in files if file.stat().st_size)


async def _drive(gateway: str, arrivals: Sequence[Arrival], most: float, plan: Plan) -> dict[str, Any]:
    """Send each at its moment; what has not ended `most` seconds after the first is given up."""
    from muxserve.client import AsyncClient

    async with AsyncClient(gateway) as client:
        # What comes first is compiled, or captured, and does not count.
        first = [arrival for arrival in arrivals if arrival.at < plan.window / 3]
        warm = [Arrival(0.0, f"m{number}", (5, 6, 7), 4) for number in range(plan.models)]
        await _send(client, warm, 2 * most)
        await _send(client, first, most)
        results = await _send(client, arrivals, most)
    return _told_of(results, len(arrivals), plan)


async def _send(client: Any, arrivals: Sequence[Arrival], most: float) -> list[_Result]:
    begun = time.perf_counter()
    tasks = [asyncio.create_task(_request(client, arrival, begun)) for arrival in arrivals]
    done, waiting = await asyncio.wait(tasks, timeout=most)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return [task.result() for task in done]


@dataclass(frozen=True)
class _Result:
    arrival: Arrival
    first_s: float
    end_s: float
    """Both from its arrival on."""
    tokens: int
    error: str = ""

    @property
    def kept(self) -> bool:
        """Whether it was as quick as it should be."""
        token_s = (self.end_s - self.first_s) / max(1, self.tokens - 1)
        return not self.error and self.first_s <= FIRST_SLO and token_s <= TOKEN_SLO


async def _request(client: Any, arrival: Arrival, begun: float) -> _Result:
    due = begun + arrival.at
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    first, count = float("nan"), 0
    try:
        stream = client.stream(
            arrival.model,
            prompt_tokens=arrival.prompt,
            max_tokens=arrival.new,
            temperature=0,
            ignore_eos=True,
        )
        async for chunk in stream:
            if chunk.token_ids and not count:
                first = time.perf_counter() - due
            count += len(chunk.token_ids)
    except Exception as error:  # a refusal is a result
        return _Result(
            arrival, first, time.perf_counter() - due, count, f"{type(error).__name__}: {error}"[:200]
        )
    return _Result(arrival, first, time.perf_counter() - due, count)


def _told_of(results: list[_Result], sent: int, plan: Plan) -> dict[str, Any]:
    ended = [one for one in results if not one.error]
    last = max((one.arrival.at + one.end_s for one in ended), default=float("nan"))
    models = sorted({one.arrival.model for one in results})
    return {
        "ended": len(ended),
        "not_ended": sent - len(results),
        "errors": sorted({one.error for one in results if one.error})[:5],
        "seconds": last,
        "tokens_per_s": sum(one.tokens for one in ended) / last,
        "kept_slo": sum(one.kept for one in results) / sent,
        "kept_slo_by_model": {
            name: float(np.mean([one.kept for one in results if one.arrival.model == name]))
            for name in models
        },
        "first_s": _quantiles([one.first_s for one in ended]),
        "per_token_s": _quantiles([one.end_s / max(1, one.tokens) for one in ended]),
        "window": plan.window,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
