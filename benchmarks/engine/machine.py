"""What is read off the machine: its description, who uses its cores, and processes' memory."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_tile",
    "bf16",
    "sve",
)
"""Instruction sets that matter here."""


def describe() -> dict[str, Any]:
    """This machine and this state of the sources, for raw results."""
    info = Path("/proc/cpuinfo").read_text()
    lines = (line.partition(":") for line in info.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    present = fields.get("flags", fields.get("Features", "")).split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": fields.get("model name", platform.machine()),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": sorted(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "load_before": os.getloadavg(),
    }


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        folder = Path(__file__).parent
        done = subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""


def tree(pid: int) -> list[psutil.Process]:
    """The process and all below it that still live."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def cpu_seconds(pids: list[int]) -> float:
    """CPU time used so far by these processes and all below them, those that have ended included."""
    total = 0.0
    for pid in pids:
        for process in tree(pid):
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])
    return total


def role(command: list[str]) -> str:
    """What a command line runs: "muxserve.worker", "muxserve.engine.executor decode", "valkey-server"."""
    if "-m" not in command:
        return Path(command[0].split()[0]).name if command else "?"
    # The last one: before it may come a program that starts the other.
    last = len(command) - 1 - command[::-1].index("-m")
    kind = command[command.index("--kind") + 1 :][:1] if "--kind" in command else []
    return " ".join((*command[last + 1 : last + 2], *kind))


def memory(pid: int) -> dict[str, int]:
    """Bytes of one process: proportional share (`pss`), resident, and how much of that is its own or shared.
    Empty if it is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return {
            "pss": sizes["Pss"],
            "rss": sizes["Rss"],
            "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
            "shared": sizes["Shared_Clean"] + sizes["Shared_Dirty"],
        }
    return {}


class Others:
    """How much of the cores went to anything but the processes that are measured, from its making on."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._own, self._all, self._begun = cpu_seconds(pids), _busy(), time.perf_counter()

    def cores(self) -> float:
        """In cores, on average; what the hypervisor gave to other machines counts."""
        passed = time.perf_counter() - self._begun
        return max(0.0, (_busy() - self._all - cpu_seconds(self._pids) + self._own) / passed)


def _busy() -> float:
    """Seconds that all cores together were not idle."""
    times = psutil.cpu_times()
    return float(sum(times[:8])) - times.idle - times.iowait  # user … steal; guests count as user already
