"""Processes are kept alive, given up in the end, and stopped in order; with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from muxserve.cli import supervisor
from muxserve.cli.deployment import ProcessSpec
from muxserve.cli.supervisor import GaveUp, SupervisedProcess, Supervisor

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)


def spec(name: str, code: str, *, stage: int = 0, grace: float = 5.0) -> ProcessSpec:
    return ProcessSpec(name, "127.0.0.1:1", (sys.executable, "-S", "-c", code), stage, grace)


async def eventually(true: Callable[[], bool], limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while not true():  # noqa: ASYNC110 (what is waited for is in another process)
            await asyncio.sleep(0.01)


class Log:
    """What a supervisor reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.changes = 0

    def changed(self) -> None:
        self.changes += 1


def supervise(folder: Path, log: Log, *specs: ProcessSpec) -> Supervisor:
    return Supervisor(specs, folder, log.lines.append, log.changed)


async def test_a_process_that_is_killed_is_started_again_at_once(tmp_path: Path) -> None:
    log = Log()
    async with supervise(tmp_path, log, spec("a", SLEEP)) as running:
        running.start("a")
        process = running.processes["a"]
        await eventually(lambda: process.pid > 0)
        first = process.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: process.pid not in (0, first), limit=2.0)
        second = process.pid
        assert (process.restarts, log.changes) == (1, 2)
        assert log.lines == ["a was killed by SIGKILL; starting it again"]
    assert not psutil.pid_exists(second)


async def test_a_process_that_does_not_stay_is_given_up_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    failing = spec("a", "import sys; sys.exit('no luck today')")
    async with supervise(tmp_path, Log(), failing, spec("b", SLEEP)) as running:
        running.start("b")
        running.start("a")
        with pytest.raises(GaveUp, match=r"(?s)a died 5 times.*no luck today"):
            async with asyncio.timeout(20):
                await running.failed()
        survivor = running.processes["b"].pid
    assert not psutil.pid_exists(survivor)


async def test_bad_settings_are_given_up_at_once(tmp_path: Path) -> None:
    async with supervise(
        tmp_path, Log(), spec("a", "import sys; print('cores: bad'); sys.exit(2)")
    ) as running:
        running.start("a")
        with pytest.raises(GaveUp, match=r"(?s)exit code 2.*cores: bad"):
            async with asyncio.timeout(10):
                await running.failed()
        assert running.processes["a"].restarts == 0


async def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    log = Log()
    async with supervise(tmp_path, log, spec("a", STUBBORN, grace=0.3)) as running:
        running.start("a")
        await eventually(lambda: (tmp_path / "a.log").exists() and (tmp_path / "a.log").stat().st_size > 0)
    assert log.lines == ["a did not stop within 0.3 s; killed"]


async def test_stages_stop_one_after_another(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        f"    open({str(order)!r}, 'a').write(NAME)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print(1, flush=True)\n"
        "time.sleep(60)"
    )
    specs = [spec(name, code.replace("NAME", repr(name)), stage=int(name)) for name in "210"]
    async with supervise(tmp_path, Log(), *specs) as running:
        for name in "210":
            running.start(name)
        logs = [tmp_path / f"{name}.log" for name in "210"]
        await eventually(lambda: all(log.exists() and log.stat().st_size for log in logs))
    assert order.read_text() == "012"


async def test_a_kill_ends_everything_at_once(tmp_path: Path) -> None:
    log = Log()
    async with supervise(tmp_path, log, spec("a", STUBBORN, grace=60)) as running:
        running.start("a")
        await eventually(lambda: running.processes["a"].pid > 0)
        running.kill()
    assert not log.lines


async def test_what_stops_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    process = SupervisedProcess(spec("a", SLEEP), tmp_path / "a.log", Log().lines.append)
    task = asyncio.create_task(process.run(lambda: None))
    await asyncio.sleep(0)
    await process.stop()
    async with asyncio.timeout(5):
        await task
    assert process.pid == 0


@pytest.mark.parametrize("kind", ["module", "program"])
def test_a_child_dies_with_its_parent(kind: str) -> None:
    command = ["-m", "http.server", "0", "--bind", "127.0.0.1"] if kind == "module" else ["/bin/sleep", "60"]
    code = (
        "import os, subprocess, sys\n"
        "launcher = [sys.executable, '-m', 'muxserve.cli.child', str(os.getpid())]\n"
        f"child = subprocess.Popen([*launcher, *{command!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        wanted = "http.server" if kind == "module" else "sleep"
        deadline = 200
        while wanted not in " ".join(child.cmdline()) or (kind == "program" and child.name() != "sleep"):
            deadline -= 1
            assert deadline and child.is_running()
            parent.poll()
            psutil.wait_procs([child], timeout=0.05)
        parent.kill()
        parent.wait()
        gone, _ = psutil.wait_procs([child], timeout=5)
    assert gone
