"""Keeps the processes of a deployment running: starts them, starts them again when they die, stops them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from muxserve.cli.deployment import ProcessSpec

DEATHS = 5
WINDOW = 30.0
"""A process that dies DEATHS times within WINDOW seconds is given up."""

FIRST_DELAY = 0.1
"""Seconds before the second restart within the window; the first is immediate, each further one doubles."""

BAD_SETTINGS = 2
"""Exit code of a service that does not understand its settings: starting it again cannot help."""

TAIL_LINES = 12


class GaveUp(Exception):
    """A process does not stay alive."""


class SupervisedProcess:
    """One process and its successors."""

    def __init__(self, spec: ProcessSpec, log: Path, report: Callable[[str], None]) -> None:
        self.spec = spec
        self.restarts = 0
        self.pid = 0
        """Of the process that runs; 0 while there is none."""
        self._log = log
        self._report = report
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._deaths: deque[float] = deque(maxlen=DEATHS)

    async def run(self, started: Callable[[], None]) -> None:
        """Start it and keep it alive until `stop`; `started` is called after every start. Raises GaveUp."""
        while not self._stopping:
            with self._log.open("ab") as log:
                # A session of its own: Ctrl-C in the terminal is for the supervisor alone.
                self._process = await asyncio.create_subprocess_exec(
                    *self.spec.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if self._stopping:
                self._send(signal.SIGKILL)
            self.pid = self._process.pid
            started()
            code = await self._process.wait()
            self.pid = 0
            if self._stopping:
                return
            delay = self._judge(code)
            self.restarts += 1
            self._report(f"{self.spec.name} {_ending(code)}; starting it again")
            await asyncio.sleep(delay)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it runs; after SIGTERM and SIGKILL it is not started again."""
        self._stopping = True
        self._send(number)

    async def stop(self) -> None:
        """End it within its grace, or kill it."""
        self.signal(signal.SIGTERM)
        if self._process is None:
            return
        try:
            async with asyncio.timeout(self.spec.stop_grace):
                await self._process.wait()
        except TimeoutError:
            self._report(f"{self.spec.name} did not stop within {self.spec.stop_grace:g} s; killed")
            self.signal(signal.SIGKILL)
            await self._process.wait()

    def tail(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def _send(self, number: int) -> None:
        # Not Process.send_signal: it may reap a process that has just died, and then its exit code is lost.
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _judge(self, code: int) -> float:
        """Seconds until the next start after an end with `code`. Raises GaveUp."""
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - death < WINDOW for death in self._deaths)
        if code == BAD_SETTINGS or recent >= DEATHS:
            how = _ending(code) if code == BAD_SETTINGS else f"died {recent} times within {WINDOW:g} s"
            raise GaveUp(f"{self.spec.name} {how}; its log {self._log} ends with:\n{self.tail()}")
        return 0.0 if recent == 1 else FIRST_DELAY * 2.0 ** (recent - 2)


class Supervisor:
    """All processes of a deployment. A context manager, at whose end everything is stopped, in stages."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        logs: Path,
        report: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self.processes = {
            spec.name: SupervisedProcess(spec, logs / f"{spec.name}.log", report) for spec in specs
        }
        self._changed = changed
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self, name: str) -> None:
        """Start a process and keep it alive."""
        task = asyncio.create_task(self.processes[name].run(self._changed), name=name)
        task.add_done_callback(self._ended)
        self._tasks[name] = task

    async def failed(self) -> None:
        """Returns never; raises GaveUp when a process does not stay alive."""
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Stop everything, stage by stage."""
        ordered = sorted(self.processes.values(), key=lambda process: process.spec.stop_stage)
        for _, stage in groupby(ordered, key=lambda process: process.spec.stop_stage):
            await asyncio.gather(*(process.stop() for process in stage))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._failed.cancel()

    def kill(self) -> None:
        """End everything now."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
