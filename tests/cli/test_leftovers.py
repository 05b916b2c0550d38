"""What a process leaves behind is found, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from muxserve.cli import leftovers
from muxserve.cli.leftovers import Traces

HOLDER = """
import mmap, os, sys
fd = os.memfd_create("test")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
print(os.getpid(), fd, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that nobody else makes files in, and where nobody finds ours."""
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], int]:
    """A process with a memfd; and the number of its descriptor."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().split()[1])


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=10)


def test_processes_that_live_and_memory_that_others_hold_are_left() -> None:
    process, descriptor = holder()
    traces = Traces()
    traces.record(process.pid)
    assert f"process {process.pid}" in traces.left()
    mine = os.open(f"/proc/{process.pid}/fd/{descriptor}", os.O_RDWR)
    end(process)
    assert traces.left() == [f"shared memory held by process {os.getpid()}"]
    os.close(mine)
    assert traces.left() == []


def test_a_new_file_in_shared_memory_is_left_unless_somebody_holds_it(shared_memory: Path) -> None:
    traces = Traces()
    file = shared_memory / "file"
    with file.open("w"):
        assert str(file) not in traces.left()
    try:
        assert str(file) in traces.left()
    finally:
        file.unlink()
    assert str(file) not in traces.left()


@pytest.mark.parametrize("comes", [True, False])
def test_a_file_that_comes_or_goes_meanwhile_is_not_left(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """Somebody else's: its holder cannot be asked any more, or lets go of it at that moment."""
    traces, file = Traces(), shared_memory / "file"
    if not comes:
        file.touch()

    def pids() -> list[int]:
        if comes:
            file.touch()
        else:
            file.unlink()
        return []

    monkeypatch.setattr(psutil, "pids", pids)
    assert traces.left() == []


def test_nothing_is_left_of_what_was_never_there() -> None:
    traces = Traces()
    traces.record(2**22 - 1)
    assert traces.left() == []
