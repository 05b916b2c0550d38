"""`Child`: a process started by the worker, waited for without threads or signals."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


class Child:
    """`python -m MODULE ARGUMENTS…` as a child process that keeps the descriptors `pass_fds`.

    The interpreter's own fork + exec in C is used, with no Python code in between, which is safe beside
    gRPC's threads. Must be made on the main thread: PDEATHSIG fires when the thread that made a child ends.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        stderr: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,  # the terminal's Ctrl-C is the worker's alone
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Process id; still set after the end."""
        return self._process.pid

    async def wait(self) -> int:
        """Exit code, negative for a signal."""
        await self._ended.wait()
        assert self._process.returncode is not None
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if not self._ended.is_set():
            self._process.kill()

    async def end(self, grace: float) -> int:
        """Wait `grace` seconds for it to end, then kill it; the exit code."""
        try:
            async with asyncio.timeout(grace):
                return await self.wait()
        except TimeoutError:
            pass
        finally:
            self.kill()
        return await self.wait()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._ended.set()
