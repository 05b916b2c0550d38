"""The MPS daemon's life, with a program in its place that takes the same commands."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from muxserve.engine.cuda.mps import MpsDaemon
from muxserve.engine.cuda.runtime import DeviceError

PROGRAM = """#!{python}
import os, socket, subprocess, sys
pipes = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
assert os.path.isdir(os.environ["CUDA_MPS_LOG_DIRECTORY"])
path = os.path.join(pipes, "control")
if sys.argv[1:] == ["-d"]:
    if {broken}: sys.exit(1)
    ready, told = os.pipe()
    server = subprocess.Popen([sys.executable, __file__, "serve", str(told)], pass_fds=[told],
                              start_new_session=True)
    server.returncode = 0  # not ours to wait for
    os.close(told)
    assert os.read(ready, 1) == b"x"
elif sys.argv[1:2] == ["serve"]:
    if os.path.exists(path): os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with open(os.path.join(pipes, "nvidia-cuda-mps-control.pid"), "w") as file:
        file.write(str(os.getpid()))
    os.write(int(sys.argv[2]), b"x")
    while True:
        client, _ = listener.accept()
        command = client.recv(100)
        if command == b"quit\\n": break
        client.sendall(b"100.0\\n")
else:
    client = socket.socket(socket.AF_UNIX)
    try: client.connect(path)
    except OSError: sys.exit(1)
    client.sendall(sys.stdin.readline().encode())
    client.recv(100)
"""


def program(folder: Path, *, broken: bool = False) -> str:
    path = folder / "control"
    path.write_text(PROGRAM.format(python=sys.executable, broken=broken))
    path.chmod(0o700)
    return str(path)


def running(directory: Path) -> int:
    """A descriptor of the daemon's process."""
    return os.pidfd_open(int((directory / "pipe" / "nvidia-cuda-mps-control.pid").read_text()))


def ended(pidfd: int, timeout: float = 0) -> bool:
    return bool(select.select([pidfd], [], [], timeout)[0])


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("m")


def test_a_daemon_runs_from_start_to_stop_in_a_directory_of_its_own(tmp_path: Path, directory: Path) -> None:
    daemon = MpsDaemon(directory, program(tmp_path))
    daemon.start()
    process = running(directory)
    assert not ended(process)
    assert (directory / "pipe").stat().st_mode & 0o777 == 0o700
    daemon.stop()
    assert ended(process)
    daemon.stop()
    os.close(process)


def test_an_executor_is_told_where_the_daemon_is_and_how_much_it_may_use(directory: Path) -> None:
    daemon = MpsDaemon(directory)
    assert daemon.environment(62.5) == {
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(directory / "log"),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "62.5",
    }
    for percentage in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match="percentage"):
            daemon.environment(percentage)


def test_a_daemon_that_a_killed_owner_left_is_ended_by_the_next(tmp_path: Path, directory: Path) -> None:
    MpsDaemon(directory, program(tmp_path)).start()
    left = running(directory)
    daemon = MpsDaemon(directory, program(tmp_path))
    daemon.start()
    assert ended(left)
    daemon.stop()
    os.close(left)


def test_a_process_id_that_is_another_processs_by_now_harms_nobody(tmp_path: Path, directory: Path) -> None:
    (directory / "pipe").mkdir()
    (directory / "pipe" / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}")
    daemon = MpsDaemon(directory, program(tmp_path))
    daemon.start()
    daemon.stop()


def test_a_daemon_that_cannot_be_is_refused_with_the_reason(tmp_path: Path, directory: Path) -> None:
    for made, reason in (
        (MpsDaemon(directory, "no-such-program"), "no-such-program: No such file"),
        (MpsDaemon(directory, program(tmp_path, broken=True)), "-d failed with 1"),
        (MpsDaemon(directory, "true"), "the daemon does not run"),
    ):
        with pytest.raises(DeviceError, match=reason) as caught:
            made.start()
        assert caught.value.field == "partition"
    with pytest.raises(DeviceError, match="too long a path"):
        MpsDaemon(Path("/" + "x" * 100))
