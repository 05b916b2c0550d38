"""Through gateway, scheduler and worker: `muxserve up` on free ports, streams from another process."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.engine.contender import Contender, ContenderFailed
from benchmarks.engine.lineup import OURS
from benchmarks.engine.plan import Cell, Plan
from benchmarks.engine.rounds import Measurement, Rounds, chosen, rate

MODEL = "m"
SERVICES = "services"
READY_LIMIT = 300.0
"""Seconds after which `muxserve up` is given up."""

LEAST_ARENA = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Deployment:
    """A `muxserve up` that is ready."""

    pid: int
    gateway: str
    ready_s: float
    """From starting it to its being ready."""


@contextmanager
def deployment(model: Path, arena: int, cores: int, log: Path) -> Iterator[Deployment]:
    """Starts one and stops it. Raises ContenderFailed."""
    begun = time.perf_counter()
    with TemporaryDirectory(prefix="muxserve-benchmark-") as folder, log.open("w") as errors:
        ready_file = Path(folder) / "ready.json"
        # As a child that cannot outlive this process, however it ends.
        command = [sys.executable, "-m", "muxserve.cli.child", f"{os.getpid()}", "-m", "muxserve.cli.main"]
        command += ["up", "--model", f"{MODEL}={model},dtype=bfloat16"]
        command += ["--port", "0", "--admin-port", "0", "--cores", f"{cores}", "--arena", f"{arena}"]
        command += ["--run-dir", f"{folder}/run", "--ready-file", f"{ready_file}", "--log-level", "warning"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        limit = threading.Timer(READY_LIMIT, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "ready":
                    break
            else:
                raise ContenderFailed(f"muxserve up: {log.read_text().strip() or 'it has ended'}")
            ready_s = time.perf_counter() - begun
            limit.cancel()
            # The lines after "ready" are printed once the file is there.
            process.stdout.readline()
            yield Deployment(process.pid, json.loads(ready_file.read_text())["gateway"], ready_s)
        finally:
            limit.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True, slots=True)
class Through:
    """What was measured through the services, and of the engine alone beside it."""

    ready_s: float
    memory: dict[str, dict[str, int]]
    done: list[Measurement]
    streams: tuple[Cell, ...]
    lone: Cell

    @property
    def ratio(self) -> float:
        """Decode through the services over decode of the engine alone, most streams."""
        cell = self.streams[-1]
        return rate(self.done, SERVICES, cell) / rate(self.done, OURS, cell)

    @property
    def ttft_over_prefill_s(self) -> float:
        """A lone request's time to first token less the engine's own for the same prompt. Medians."""
        return self.first_s(SERVICES) - self.first_s(OURS)

    def first_s(self, contender: str) -> float:
        """Median time to first token of a lone request."""
        return statistics.median(one.first_s for one in chosen(self.done, contender, self.lone))

    def as_json(self) -> dict[str, Any]:
        """For raw results."""
        return {
            "ready_s": self.ready_s,
            "memory": self.memory,
            "streams": [asdict(cell) for cell in self.streams],
            "lone": asdict(self.lone),
            "measurements": [asdict(one) for one in self.done],
        }


def measure(
    plan: Plan,
    engine: Contender,
    model: Path,
    logs: Path,
    cores: int,
    deadline: float,
    advance: Callable[[str], None],
) -> Through:
    """The engine alone, which is ready, and the services by turns; no round but the first is begun after
    `deadline`. Raises ContenderFailed."""
    figures = engine.ready["model"]
    tokens = 2 * max(plan.streams) * (plan.stream_prompt + plan.stream_tokens)
    arena = max(LEAST_ARENA, tokens * figures["kv_bytes_per_token"])
    with deployment(model, arena, cores, logs / "up.log") as running:
        command = [sys.executable, "-m", "benchmarks.engine.streams"]
        command += ["--address", running.gateway, "--model", MODEL]
        log = logs / "streams.log"
        with Contender(SERVICES, command, log, also=[running.pid], pausable=False) as client:
            client.wait_ready()
            rounds = Rounds((engine, client), {}, figures["vocabulary"], plan.retries, advance)
            rounds.warm_up()
            for number in range(plan.stream_rounds):
                if number and time.perf_counter() > deadline:
                    break
                rounds.round(number, [*plan.stream_cells, *[plan.lone] * plan.lone_requests])
            used = client.memory()
    return Through(running.ready_s, used, rounds.done, plan.stream_cells, plan.lone)
