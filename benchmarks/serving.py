"""`Serving`: `muxserve up` on free ports, as benchmarks start it and end it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.engine.contender import ContenderFailed

END_LIMIT = 20.0
"""Seconds after which a process that was asked to end is killed."""


class Serving:
    """A running service. To be closed."""

    def __init__(self, process: asyncio.subprocess.Process, reader: asyncio.Task[None], ready: Any) -> None:
        self.pid = process.pid
        self.ready: dict[str, Any] = ready
        """What the ready file says."""
        self._process = process
        self._reader = reader

    @classmethod
    async def start(cls, name: str, options: Sequence[str], folder: Path, limit: float) -> Self:
        """`muxserve up` with these options, its files in a new `folder`, ready within `limit` seconds.

        name: in errors. Raises ContenderFailed.
        """
        make(folder)
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "muxserve.cli.child", f"{os.getpid()}", "-m", "muxserve.cli.main"]
        command += ["up", "--port", "0", "--admin-port", "0"]
        command += ["--run-dir", f"{folder / 'run'}", "--ready-file", f"{ready}", *options]
        with (folder / "errors.log").open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(limit):
                # The address is the first thing that is said after "ready", the file is there by then.
                async for line in process.stdout:
                    if line.split()[:1] == [b"gateway"]:
                        break
                else:
                    said = (folder / "errors.log").read_text().strip()[-2000:]
                    raise ContenderFailed(f"{name}: {said or 'it has ended'}")
        except BaseException:
            await end(process)
            raise
        drained = asyncio.create_task(_drain(process.stdout))
        return cls(process, drained, json.loads(ready.read_text()))

    async def close(self) -> None:
        """End it."""
        await end(self._process)
        await self._reader


def make(folder: Path) -> None:
    """A new one; in a function of its own, for it may block and takes no time."""
    folder.mkdir(parents=True)


async def end(process: asyncio.subprocess.Process) -> None:
    """With SIGTERM, or with SIGKILL if that does not help."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(END_LIMIT):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _drain(stream: asyncio.StreamReader) -> None:
    """Read what nobody is interested in, so that its writer never waits."""
    while await stream.read(65536):
        pass
