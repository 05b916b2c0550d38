"""The part of a worker: a process that owns device memory, which the runner in this process maps.

CUDA opens no handle in the process that made it. `python -m benchmarks.gpu.owner`, as a program, takes
requests of one line of JSON each from its standard input, and answers each: `{"create": bytes}` with
`{"number", "handle"}`, `{"free": number}` with `{}`; or `{"error"}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.runtimes import runtime
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime


@dataclass(frozen=True, slots=True)
class Held:
    """Memory of the owner. handle: for who maps it."""

    number: int
    handle: bytes
    size: int


class Owner(Protocol):
    """Of device 0."""

    def create(self, size: int) -> Held: ...

    def free(self, held: Held) -> None: ...

    def close(self) -> None: ...


class ProcessOwner:
    """An owner on a GPU."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.owner"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def create(self, size: int) -> Held:
        found = self._ask({"create": size})
        return Held(int(found["number"]), bytes.fromhex(found["handle"]), size)

    def free(self, held: Held) -> None:
        self._ask({"free": held.number})

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, request: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the owner ended"}')
        if "error" in answer:
            raise RuntimeError(f"{request}: {answer['error']}")
        return answer


class LocalOwner:
    """An owner of memory of a runtime that two of one process may share: the tests' own."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._held: dict[int, DeviceMemory] = {}

    def create(self, size: int) -> Held:
        memory = DeviceMemory.create(size, "benchmark", runtime=self._runtime)
        self._held[memory.pointer] = memory
        return Held(memory.pointer, memory.handle, size)

    def free(self, held: Held) -> None:
        self._held.pop(held.number).close()

    def close(self) -> None:
        for memory in self._held.values():
            memory.close()
        self._held.clear()


def open_owner(device: str, folder: Path) -> tuple[Owner, CudaRuntime]:
    """An owner, and the runtime of who maps its memory here."""
    if device == "cuda":
        return ProcessOwner(), runtime(device, folder)
    # Two of one process: the second passes for another one.
    return LocalOwner(runtime(device, folder)), runtime(device, folder, os.getppid())


def main() -> None:
    """Until its standard input ends."""
    held: dict[int, DeviceMemory] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "create" in request:
                memory = DeviceMemory.create(request["create"], "benchmark")
                number = len(held)
                held[number] = memory
                answer = {"number": number, "handle": memory.handle.hex()}
            else:
                held[request["free"]].close()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
