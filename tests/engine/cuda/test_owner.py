"""An executor that maps memory of an owner that has died ends, whatever is still in its socket."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muxserve.engine.cuda.owner import Owner, OwnerDied
from tests.engine.cuda.fake import DEAD, FakeRuntime
from tests.engine.cuda.processes import ROOT, start

OWNER = """
import subprocess, sys
from pathlib import Path
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.link import Link
from muxserve.engine.messages import RemoveModel, Shutdown
from tests.engine.cuda.fake import FakeRuntime
runtime = FakeRuntime(Path(sys.argv[1]))
memory = DeviceMemory.create(100, "arena", runtime=runtime)
runtime.bytes(memory.pointer, 100)[:] = 17
ours, theirs = Link.pair()
pipe = int(sys.argv[3])
arguments = [sys.argv[1], memory.handle.hex(), str(theirs.fileno()), str(pipe)]
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], *arguments], pass_fds=[theirs.fileno(), pipe])
link = Link(ours, Shutdown)
for job in ("first", "second", "third"):  # messages of any kind: what counts is that they wait in the socket
    link.send(RemoveModel(job))
print(child.pid, flush=True)
child.wait()
"""

EXECUTOR = """
import os, socket, sys
from pathlib import Path
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.cuda.owner import Owner, OwnerDied
from muxserve.engine.link import Link, LinkClosed
from muxserve.engine.messages import Command
from tests.engine.cuda.fake import FakeRuntime
owner = Owner(os.getppid())
runtime = FakeRuntime(Path(sys.argv[1]))
memory = DeviceMemory.attach(bytes.fromhex(sys.argv[2]), 100, "arena", runtime=runtime)
link = Link(socket.socket(fileno=int(sys.argv[3])), Command)
try:
    while True:
        job, _ = link.receive()
        owner.check()
        read = int(runtime.bytes(memory.pointer, 100)[0])
        os.write(int(sys.argv[4]), f"{job.model} {read}\\n".encode())
        if job.model == "first":
            os.read(int(sys.argv[4]), 1)  # the test says when the first job is done
except OwnerDied as error:
    os.write(int(sys.argv[4]), f"ended: {job.model} not run\\n".encode())
    os._exit(3)
except LinkClosed:
    os._exit(4)
"""


def test_jobs_that_are_still_in_the_socket_when_the_owner_dies_are_not_run(device: Path) -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pass_fds = [theirs.fileno()]
            arguments = [str(device), EXECUTOR, str(theirs.fileno())]
            owner = start(OWNER, *arguments, stdout=subprocess.PIPE, pass_fds=pass_fds)
        assert owner.stdout is not None
        executor = int(owner.stdout.readline())
        assert ours.recv(100) == b"first 17\n"
        pidfd = os.pidfd_open(executor)
        owner.kill()
        owner.wait()
        owner.stdout.close()
        free, total = FakeRuntime(device).memGetInfo()
        assert free == total, "its memory has gone"
        ours.send(b"x")
        assert ours.recv(100) == b"ended: second not run\n", f"it would have read {DEAD}"
        assert select.select([pidfd], [], [], 60)[0], "the executor has ended"
        os.close(pidfd)


CHILD = """
import os, select
from muxserve.common.parent import die_with_parent
from muxserve.engine.cuda.owner import Owner
die_with_parent(os.getppid())
owner = Owner(os.getppid())
owner.check()
print("mapped", flush=True)
select.select([owner], [], [])  # the kernel may be first, with its SIGKILL
"""

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""


def test_an_idle_executor_ends_with_its_owner() -> None:
    parent = start(PARENT, CHILD, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid, ready = int(parent.stdout.readline()), parent.stdout.readline()
    assert ready == "mapped\n"
    pidfd = os.pidfd_open(pid)
    os.kill(parent.pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    parent.wait()
    parent.stdout.close()


def test_the_owner_is_the_parent_and_lives() -> None:
    owner = Owner(os.getppid())
    assert not select.select([owner], [], [], 0)[0]
    owner.check()
    owner.close()
    owner.close()


def test_a_process_that_has_ended_or_is_another_owns_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""], cwd=ROOT)
    done.wait()
    with pytest.raises(OwnerDied, match="has ended"):
        Owner(done.pid)
    with pytest.raises(OwnerDied, match="is not the parent"):
        Owner(os.getpid())
