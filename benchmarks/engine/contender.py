"""`Contender`: a process that generates when asked, and does nothing at all in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.engine.machine import memory, role, tree
from benchmarks.engine.peers.wire import Timing

ROOT = Path(__file__).parents[2]
"""Of the repository: where `benchmarks` can be imported from."""


class ContenderFailed(Exception):
    """It could not start or answer; the message ends with what it wrote last."""


class Contender:
    """Speaks `peers.wire` with a child process, which is stopped (SIGSTOP) with all processes below it while
    it is not its turn: a peer whose threads spin would otherwise run on the cores that are measured.

    command: the program. log: where its errors go. also: pids of processes that work for it and are not below
    it. pausable: False for one whose processes must go on.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        also: Sequence[int] = (),
        pausable: bool = True,
    ) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self.ready_s = 0.0
        self._begun = time.perf_counter()
        self._log = log
        self._also = list(also)
        self._pausable = pausable
        path = os.pathsep.join(filter(None, (f"{ROOT}", os.environ.get("PYTHONPATH", ""))))
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Processes whose trees work for it."""
        return [self._process.pid, *self._also]

    def wait_ready(self) -> None:
        """Returns when it has loaded its model: `ready` is what it says then, `ready_s` the seconds that it
        took from its start. Raises ContenderFailed."""
        self.ready = self._receive()
        self.ready_s = time.perf_counter() - self._begun
        self.pause()

    def generate(self, prompts: list[list[int]], new: int, **more: Any) -> Timing:
        """One request of `peers.wire`. Raises ContenderFailed."""
        assert self._process.stdin is not None
        self.resume()
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new": new, **more}) + "\n")
            self._process.stdin.flush()
            answer = self._receive()
        except BrokenPipeError:
            raise self._ended() from None
        finally:
            self.pause()
        if "error" in answer:
            raise self._failed(answer["error"])
        return Timing(**answer)

    def pause(self) -> None:
        """Stop all of it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def memory(self) -> dict[str, dict[str, int]]:
        """By "role (pid)", of every process of it."""
        found = {}
        for pid in self.pids:
            for process in tree(pid):
                with suppress(psutil.NoSuchProcess):
                    found[f"{role(process.cmdline())} ({process.pid})"] = memory(process.pid)
        return found

    def close(self) -> None:
        """End it; one that does not end by itself is killed, with all below it."""
        self.resume()
        processes = tree(self._process.pid)
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._pausable:
            for process in tree(self._process.pid):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> ContenderFailed:
        return self._failed(f"it has ended with code {self._process.wait()}")

    def _failed(self, reason: str) -> ContenderFailed:
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        return ContenderFailed("\n".join((f"{self.name}: {reason}", *tail)))
