"""A section in a process of its own: what it breaks, it breaks for itself, and it can be ended.

`python -m benchmarks.gpu.process NAME --device … --part FILE`. It imports what it needs, says "ready", and
begins when a line of JSON comes: `{"seconds": …, "earlier": {…}}`. So the next one starts up while one
measures. What it has found is in FILE at any time: `{"found": …, "doing": …}`, at the end with "seconds", and
with "error" if it failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.context import Context, write_json
from benchmarks.gpu.sections import BY_NAME, Section


def missing(section: Section, device: str) -> list[str]:
    """Modules that it needs and that are not installed."""
    needed = (*section.needs, *(section.on_device if device == "cuda" else ()))
    return [name for name in needed if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent that is not there
        return False


def measure(section: Section, context: Context) -> dict[str, Any]:
    """Run it here. What it found, also if it failed: then with the traceback. Never raises."""
    begun = time.perf_counter()
    result: dict[str, Any] = {}
    try:
        module: Any = importlib.import_module(section.module)
        result["found"] = module.run(context)
    except Exception:
        result = {"found": _kept(context), "error": traceback.format_exc()}
    return result | {"seconds": time.perf_counter() - begun}


def _kept(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = read_part(context.part).get("found", {})
    return found


def read_part(path: Path | None) -> dict[str, Any]:
    """What a section has kept so far."""
    if path is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found


class SectionProcess:
    """One section, started at once, begun by `begin`."""

    def __init__(self, section: Section, device: str, folder: Path, log: IO[str]) -> None:
        self.section = section
        self.part = folder / f"{section.name}.json"
        command = [sys.executable, "-m", "benchmarks.gpu.process", section.name]
        self._process = subprocess.Popen(
            [*command, "--device", device, "--part", str(self.part)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,  # to be ended with all that it has started
        )
        self._ends = math.inf

    def begin(self, seconds: float, earlier: dict[str, Any], tiny: bool) -> None:
        """seconds: for its work; a tenth of that, and some, is for what it cannot foresee."""
        self._ends = time.monotonic() + seconds * 1.1 + 5
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: `result` says so
            order = json.dumps({"seconds": seconds, "earlier": earlier, "tiny": tiny})
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most. Ends it when its time is over."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            if time.monotonic() < self._ends:
                return False
            self.kill()
        return True

    def result(self) -> dict[str, Any]:
        """What it has found, and, if it did not end by itself and well, how it ended."""
        kept = read_part(self.part)
        if "seconds" not in kept:
            code = self._process.returncode
            kept["error"] = f"it did not end in time: {kept.get('doing')}" if code == -9 else f"exit {code}"
        return kept

    def kill(self) -> None:
        """With all that it has started; a second call does nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def main() -> None:
    """Entry point of a section's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("--device", required=True)
    parser.add_argument("--part", type=Path, required=True)
    options = parser.parse_args()
    section = BY_NAME[options.section]
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    with suppress(Exception):  # `measure` imports it again, and says what is wrong
        importlib.import_module(section.module)
    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    context = Context(
        device=options.device,
        tiny=order["tiny"],
        ends=time.monotonic() + order["seconds"],
        earlier=order["earlier"],
        part=options.part,
    )
    write_json(options.part, measure(section, context))
    sys.stdout.flush()
    # Destroying what CUDA has is left to the driver, which cannot hang in it.
    os._exit(0)


if __name__ == "__main__":
    main()
