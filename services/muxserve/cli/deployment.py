"""Which processes a deployment is made of, and how each is started. Pure, but for choosing free ports."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxserve.common.config import DeploymentConfig, ServiceKind

PORTS = range(20_000, 32_000)
"""Where ports of services are taken from: below the kernel's range for outgoing connections, one of which
could otherwise take the port of a service while that restarts."""

HOST = "127.0.0.1"
REDIS = "redis"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process of the deployment. Its name and address stay as they are when it is started again."""

    name: str
    """Unique, for example "worker-0"; also the service's id in the registry."""
    address: str
    """host:port that it listens on."""
    command: tuple[str, ...]
    """Program and arguments."""
    stop_stage: int
    """Processes are stopped stage by stage, lowest first."""
    stop_grace: float
    """Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """All processes."""

    processes: tuple[ProcessSpec, ...]
    """In order of start; the first is Redis."""

    def address(self, name: str) -> str:
        """host:port of the process `name`."""
        return next(process.address for process in self.processes if process.name == name)

    @property
    def gateway(self) -> str:
        """Where clients connect."""
        return self.address("gateway-0")

    @property
    def admin(self) -> str:
        """Where operators connect."""
        return self.address("placement-0")


class PortTaken(Exception):
    """A port that was asked for is not free."""


def plan(config: DeploymentConfig, redis_directory: Path, redis_binary: Path) -> Deployment:
    """The deployment of `config`. Raises PortTaken."""
    workers = [f"worker-{number}" for number in range(config.workers)]
    names = [REDIS, "placement-0", "scheduler-0", "gateway-0", *workers]
    wanted = {"placement-0": config.admin_port, "gateway-0": config.port}
    addresses = {name: f"{HOST}:{port}" for name, port in _choose_ports(config.host, names, wanted).items()}
    for name in wanted:
        host = f"[{config.host}]" if ":" in config.host else config.host
        addresses[name] = f"{host}:{addresses[name].rsplit(':', 1)[1]}"

    def service(
        kind: ServiceKind, name: str, stage: int, grace: float, settings: Mapping[str, Any]
    ) -> ProcessSpec:
        common = {
            "id": name,
            "bind": addresses[name],
            "redis_url": f"redis://{addresses[REDIS]}/0",
            "log_level": config.log_level,
        }
        chosen = {**common, **settings, **config.settings.get(kind, {})}
        # JSON is YAML, which is what --set reads.
        flags = [part for key, value in chosen.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return ProcessSpec(
            name, addresses[name], (*_launcher(), "-m", f"muxserve.{kind}", *flags), stage, grace
        )

    models = [model.model_dump() for model in config.models]
    return Deployment(
        (
            ProcessSpec(
                REDIS, addresses[REDIS], _valkey(redis_binary, redis_directory, addresses[REDIS]), 3, 1.0
            ),
            service("placement", "placement-0", 2, 2.0, {"models": models, "workers": config.workers}),
            service("scheduler", "scheduler-0", 1, 2.0, {"policy": config.policy}),
            service("gateway", "gateway-0", 0, 3.5, {"drain": 2.0}),
            *(
                service("worker", name, 2, 3.0, _worker_settings(config, number))
                for number, name in enumerate(workers)
            ),
        )
    )


def _worker_settings(config: DeploymentConfig, number: int) -> dict[str, Any]:
    """Settings of worker `number`; absent ones are the worker's own defaults."""
    cores = config.cores or (len(os.sched_getaffinity(0)) if config.workers > 1 else None)
    settings = {
        "arena": int(config.arena),
        "block_bytes": config.block_bytes and int(config.block_bytes),
        "weight_budget": config.weight_budget and int(config.weight_budget),
        # The first workers get one more where cores do not divide evenly; each has at least one.
        "cores": cores and max(1, (cores + config.workers - 1 - number) // config.workers),
    }
    return {key: value for key, value in settings.items() if value is not None}


def _launcher() -> tuple[str, ...]:
    return (sys.executable, "-m", "muxserve.cli.child", str(os.getpid()))


def _valkey(binary: Path, directory: Path, address: str) -> tuple[str, ...]:
    """Valkey that keeps every accepted write through a crash."""
    host, port = address.rsplit(":", 1)
    options = {
        "bind": host,
        "port": port,
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    return (*_launcher(), str(binary), *flags)


def _choose_ports(host: str, names: list[str], wanted: Mapping[str, int]) -> dict[str, int]:
    """A port by name: the wanted one, or a free one where that is 0 or absent."""
    chosen: dict[str, int] = {}
    probes: list[socket.socket] = []
    candidates = iter(random.sample(PORTS, len(PORTS)))
    try:
        for name in names:
            address = host if name in wanted else HOST
            if wanted.get(name):
                probe = _bind(address, wanted[name])
                if probe is None:
                    raise PortTaken(f"port {wanted[name]} of {address} is taken")
            else:
                probe = next((found for port in candidates if (found := _bind(address, port))), None)
                if probe is None:
                    raise PortTaken(f"no free port in {PORTS.start}-{PORTS.stop - 1} of {address}")
            probes.append(probe)
            chosen[name] = probe.getsockname()[1]
    finally:
        for probe in probes:
            probe.close()
    return chosen


def _bind(host: str, port: int) -> socket.socket | None:
    """A socket bound to the port, or None if something listens there."""
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        # Binding alone succeeds beside another socket with SO_REUSEADDR; listening does not.
        probe.listen()
    except OSError:
        probe.close()
        return None
    return probe
