"""`MpsDaemon`: NVIDIA's Multi-Process Service, started for one worker's executors and stopped by it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from muxserve.engine.cuda.runtime import DeviceError

CONTROL_PROGRAM = "nvidia-cuda-mps-control"
_LONGEST_PATH = 107
"""Bytes of a Unix socket's path."""
_ANSWER = 30.0
"""Seconds in which the daemon must answer."""
_GRACE = 10.0
"""Seconds that it may take to end."""


class MpsDaemon:
    """A control daemon of this process's own, which other users of the machine's GPUs do not see.

    Executors that are started with `environment(percentage)` run on the device at once instead of in turns,
    each on at most that part of its multiprocessors; it is theirs for life. They must have ended before
    `stop`. A daemon that an earlier owner left in the same directory, because it was killed, is ended by
    `start`. Calls block, for seconds.
    """

    def __init__(self, directory: Path, program: str = CONTROL_PROGRAM) -> None:
        """directory: private, and short: the daemon makes sockets in it. Raises DeviceError."""
        self._pipes, self._logs = directory / "pipe", directory / "log"
        self._program = program
        self._daemon = -1
        if len(os.fsencode(self._pipes / "control_privileged")) > _LONGEST_PATH:
            raise DeviceError("partition", f"{directory} is too long a path for the sockets of MPS")

    def start(self) -> None:
        """Returns when it takes commands. Raises DeviceError, nothing left running."""
        for folder in (self._pipes, self._logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._end_leftover()
        try:
            self._control(["-d"])
            self._daemon = self._open_daemon()
            self._control([], "get_default_active_thread_percentage\n")
        except DeviceError:
            self._end_daemon()
            raise

    def environment(self, percentage: float) -> dict[str, str]:
        """For an executor that is to have this percentage of the multiprocessors. Raises ValueError."""
        if not 0 < percentage <= 100:
            raise ValueError(f"percentage: {percentage} is not in (0, 100]")
        return {**self._environment(), "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{percentage:g}"}

    def stop(self) -> None:
        """End it, by asking and then by force; a second call does nothing."""
        self._end_daemon()

    def _environment(self) -> dict[str, str]:
        return {"CUDA_MPS_PIPE_DIRECTORY": str(self._pipes), "CUDA_MPS_LOG_DIRECTORY": str(self._logs)}

    def _control(self, arguments: list[str], commands: str = "") -> None:
        name = " ".join([self._program, *arguments, commands.strip()]).strip()
        try:
            done = subprocess.run(
                [self._program, *arguments],
                input=commands,
                env={**os.environ, **self._environment()},
                stdout=subprocess.DEVNULL,  # the daemon keeps it open, and would keep a pipe's reader waiting
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=_ANSWER,
                check=False,
            )
        except OSError as error:
            raise DeviceError("partition", f"MPS: {self._program}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise DeviceError("partition", f"MPS: {name}: no answer in {_ANSWER:.0f} s") from error
        if done.returncode != 0:
            raise DeviceError("partition", f"MPS: {name} failed with {done.returncode}, see {self._logs}")

    def _open_daemon(self) -> int:
        """A descriptor of the process that the daemon says it is."""
        try:
            return os.pidfd_open(int((self._pipes / f"{CONTROL_PROGRAM}.pid").read_text()))
        except (OSError, ValueError) as error:
            raise DeviceError("partition", f"MPS: the daemon does not run, see {self._logs}") from error

    def _end_leftover(self) -> None:
        """Of an earlier owner, by asking only: the process id in the file may be another's by now."""
        try:
            daemon = self._open_daemon()
        except DeviceError:
            return
        try:
            self._control([], "quit\n")
        except DeviceError:
            return  # nobody is there
        else:
            if not select.select([daemon], [], [], _GRACE)[0]:
                raise DeviceError("partition", f"MPS: a daemon in {self._pipes} does not end")
        finally:
            os.close(daemon)

    def _end_daemon(self) -> None:
        daemon, self._daemon = self._daemon, -1
        if daemon < 0:
            return
        try:
            with suppress(DeviceError):
                self._control([], "quit\n")
            if not select.select([daemon], [], [], _GRACE)[0]:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(daemon, signal.SIGKILL)
        finally:
            os.close(daemon)
