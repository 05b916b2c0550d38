"""Who is measured: `muxserve up` under a policy, or one server per model. Each as a `System`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine.contender import ROOT, ContenderFailed
from benchmarks.engine.lineup import peer_directory
from benchmarks.engine.machine import memory, role, tree
from benchmarks.serving import Serving, end, make
from muxserve.bench.targets import Failed, Target, target

VLLM = "vllm"
READY_LIMIT = 600.0
POLL = 0.25


class System(ABC):
    """A running service of several models. To be closed."""

    name: str
    routes: dict[str, Target]
    """By model."""
    own_pace: bool = False
    """Whether its SLO follows from unloaded latencies of its own engine rather than of ours."""

    @abstractmethod
    async def close(self) -> None:
        """End it."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Processes whose trees work for it."""

    def pause(self) -> None:  # noqa: B027
        """It is not its turn: what would use the cores when idle is stopped."""

    def resume(self) -> None:  # noqa: B027
        """It is its turn."""

    def memory(self) -> dict[str, int]:
        """Proportional share in bytes, by role and pid."""
        found = {}
        for pid in self.pids():
            for process in tree(pid):
                with suppress(psutil.NoSuchProcess):
                    found[f"{role(process.cmdline())} ({process.pid})"] = memory(process.pid).get("pss", 0)
        return found


class Ours(System):
    """`muxserve up` on free ports."""

    def __init__(self, name: str, serving: Serving, models: Sequence[str]) -> None:
        self.name = name
        self.routes = dict.fromkeys(models, target(serving.ready["gateway"]))
        self._serving = serving

    @classmethod
    async def start(
        cls,
        policy: str,
        checkpoint: Path,
        models: Sequence[str],
        folder: Path,
        arena: int,
        rates: Mapping[str, float] | None = None,
    ) -> Ours:
        """All models are the same checkpoint in bfloat16: they share weights, and nothing else.

        rates: what the operator expects of each model, if anything. Raises ContenderFailed.
        """
        options = ["--arena", f"{arena}", "--log-level", "warning", "--set", f"scheduler.policy={policy}"]
        for model in models:
            rate = f",rate={rates[model]:.4f}" if rates else ""
            options += ["--model", f"{model}={checkpoint},dtype=bfloat16{rate}"]
        name = f"muxserve up, policy {policy}"
        return cls(policy, await Serving.start(name, options, folder, READY_LIMIT), models)

    def pids(self) -> list[int]:
        """See `System`."""
        return [self._serving.pid]

    async def close(self) -> None:
        """See `System`."""
        await next(iter(self.routes.values())).close()
        await self._serving.close()


class Vllm(System):
    """One vLLM server per model, all on the same cores, each with its part of the KV memory.

    Processes are stopped while it is not their turn, since their threads spin.
    """

    name = VLLM
    own_pace = True

    def __init__(self) -> None:
        self.routes = {}
        self._processes: list[asyncio.subprocess.Process] = []

    @classmethod
    async def start(
        cls,
        python: str,
        checkpoint: Path,
        models: Sequence[str],
        folder: Path,
        arena: int,
        context: int,
        cores: Sequence[int],
    ) -> Vllm:
        """Raises ContenderFailed, CannotRun."""
        make(folder)
        weights, tokenizer = await asyncio.to_thread(_prepare, checkpoint, python)
        system = cls()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "TOKENIZERS_PARALLELISM": "false"}
        try:
            for model, port in zip(models, _ports(len(models)), strict=True):
                command = [sys.executable, "-m", "muxserve.cli.child", f"{os.getpid()}", python]
                command += ["-m", "benchmarks.multiplex.peers.vllm_server", "--model", f"{weights}"]
                command += ["--tokenizer", f"{tokenizer}", "--name", model, "--context", f"{context}"]
                command += ["--cache-bytes", f"{arena // len(models)}", "--port", f"{port}"]
                command += ["--cores", *map(str, cores)]
                with (folder / f"{model}.log").open("w") as log:
                    process = await asyncio.create_subprocess_exec(
                        *command,
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        cwd=ROOT,
                        # A group of its own: should we be killed while it is stopped, it is orphaned
                        # then, and the kernel ends it.
                        process_group=0,
                    )
                system._processes.append(process)
                system.routes[model] = target(f"http://127.0.0.1:{port}")
            await system._wait_ready(folder)
        except BaseException:
            await system.close()
            raise
        return system

    async def _wait_ready(self, folder: Path) -> None:
        """Until all answer. Raises ContenderFailed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + READY_LIMIT
        for (model, each), process in zip(self.routes.items(), self._processes, strict=True):
            while True:
                with suppress(Failed):
                    await each.contexts()
                    break
                if process.returncode is not None or loop.time() > end:
                    tail = (folder / f"{model}.log").read_text(errors="replace").splitlines()[-15:]
                    raise ContenderFailed("\n".join((f"vllm, {model}: it is not ready", *tail)))
                await asyncio.sleep(POLL)

    def pids(self) -> list[int]:
        """See `System`."""
        return [process.pid for process in self._processes]

    def pause(self) -> None:
        """See `System`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """See `System`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            for process in tree(pid):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    async def close(self) -> None:
        """See `System`."""
        self.resume()
        for each in self.routes.values():
            await each.close()
        below = [process for pid in self.pids() for process in tree(pid)]
        await asyncio.gather(*(end(process) for process in self._processes))
        for left in below:
            with suppress(psutil.NoSuchProcess):
                left.kill()


def _ports(count: int) -> list[int]:
    """Free ones, below those that the kernel gives to connections."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _prepare(checkpoint: Path, python: str) -> tuple[Path, Path]:
    """Directories of weights and of the tokenizer that vLLM reads, kept in the user's cache.

    Raises CannotRun, ContenderFailed.
    """
    weights = peer_directory(checkpoint, [sys.executable, python])
    if checkpoint.is_dir():
        return weights, checkpoint
    with checkpoint.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    tokenizer = weights.with_name(f"{checkpoint.stem}-{digest}-tokenizer")
    if not tokenizer.exists():
        made = tokenizer.with_name(f".{tokenizer.name}.{os.getpid()}")
        script = Path(__file__).parent / "peers" / "tokenizer.py"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done: Any = subprocess.run(
            (sys.executable, f"{script}", f"{checkpoint}", f"{made}"),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ContenderFailed(f"the tokenizer was not converted (transformers): {done.stderr[-500:]}")
        made.rename(tokenizer)
    return weights, tokenizer
