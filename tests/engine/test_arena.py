"""Arenas in shared memory, and how much memory there is for one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from muxserve.engine.arena import ArenaError, SharedArena, require_memory
from muxserve.engine.memory import Memfd, available_memory
from muxserve.engine.messages import AttachArena

CHILD = """
import sys
from muxserve.engine.arena import SharedArena
from muxserve.engine.messages import AttachArena
fd, block_bytes, blocks = map(int, sys.argv[1:])
arena = SharedArena.attach(fd, AttachArena(block_bytes=block_bytes, blocks=blocks))
assert arena.data[5] == 17
arena.data[-1] = 99
assert "torch" not in sys.modules
"""


def test_an_arena_is_whole_blocks_of_zeros() -> None:
    arena = SharedArena.create(10_000, 4096)
    assert (arena.blocks, arena.block_bytes) == (2, 4096)
    assert arena.data.shape == (8192,)
    assert not arena.data.any()
    assert arena.descriptor() == AttachArena(block_bytes=4096, blocks=2)
    arena.close()


def test_another_process_reads_and_writes_the_same_bytes() -> None:
    arena = SharedArena.create(1 << 20, 4096)
    arena.data[5] = 17
    args = [sys.executable, "-c", CHILD, str(arena.fd), "4096", str(arena.blocks)]
    subprocess.run(args, check=True, pass_fds=[arena.fd], timeout=60)
    assert arena.data[-1] == 99
    arena.close()


def test_all_pages_are_there_from_the_start() -> None:
    size = 64 << 20
    before = resident_shared_memory()
    arena = SharedArena.create(size, 16384)
    assert os.fstat(arena.fd).st_blocks * 512 == size, "taken from the machine"
    user = SharedArena.attach(arena.fd, arena.descriptor())
    mapped = resident_shared_memory() - before
    assert mapped >= 0.9 * size, "and mapped where it is used"
    user.data[:] = 1
    assert resident_shared_memory() - before - mapped < 0.1 * size
    arena.close()


def resident_shared_memory() -> int:
    """Bytes of this process's touched shared pages."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssShmem"].split()[0]) * 1024


def test_the_memory_outlives_close_while_a_view_is_held() -> None:
    arena = SharedArena.create(8192, 4096)
    fd, view = arena.fd, arena.data
    view[0] = 3
    arena.close()
    arena.close()
    assert view[0] == 3
    assert arena.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_nobody_can_change_the_size_under_a_mapping() -> None:
    arena = SharedArena.create(8192, 4096)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    arena.close()


def test_attaching_to_what_is_not_such_an_arena_is_refused() -> None:
    arena = SharedArena.create(8192, 4096)
    with pytest.raises(ArenaError, match="8192 bytes, 12288 are expected"):
        SharedArena.attach(arena.fd, AttachArena(block_bytes=4096, blocks=3))
    arena.close()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    with pytest.raises(ArenaError, match="not sealed"):
        SharedArena.attach(unsealed, AttachArena(block_bytes=4096, blocks=2))
    os.close(unsealed)


def test_attaching_to_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, pytest.raises(ArenaError, match="not a memfd"):
        SharedArena.attach(file.fileno(), AttachArena(block_bytes=4096, blocks=2))


def test_tensor_is_the_same_memory() -> None:
    arena = SharedArena.create(8192, 4096)
    tensor = arena.tensor()
    tensor[7] = 200
    assert arena.data[7] == 200
    assert tensor.shape == (8192,)
    arena.close()


@pytest.mark.parametrize(
    ("size", "block_bytes", "field"),
    [
        (4095, 4096, "arena"),
        (0, 4096, "arena"),
        (1 << 20, 0, "block_bytes"),
        (1 << 20, 100, "block_bytes"),
        (1 << 38, 64, "arena"),
        (1 << 50, 4096, "arena"),
    ],
)
def test_an_arena_that_cannot_be_names_the_setting(size: int, block_bytes: int, field: str) -> None:
    with pytest.raises(ArenaError) as caught:
        SharedArena.create(size, block_bytes)
    assert caught.value.field == field


def test_the_refusal_says_what_was_asked_for_and_what_there_is() -> None:
    with pytest.raises(ArenaError, match="arena: 2,048 MiB are asked for, 1,024 MiB are available"):
        require_memory(2 << 30, 1 << 30)
    require_memory(1 << 30, 1 << 30)


def test_the_name_is_seen_by_people_who_look() -> None:
    memory = Memfd.create("muxserve-test", 4096)
    assert "muxserve-test" in str(Path(f"/proc/self/fd/{memory.fd}").readlink())
    assert fcntl.fcntl(memory.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    memory.close()


def test_data_is_writable_bytes() -> None:
    memory = Memfd.create("muxserve-test", 4096)
    assert memory.data.dtype == np.uint8
    assert memory.data.flags.writeable
    memory.close()


def write_proc(root: Path, available: int, cgroup: str) -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(
        f"MemTotal: 9999999 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n"
    )
    (root / "self" / "cgroup").write_text(cgroup)
    return root


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_available_memory_without_control_groups_is_the_machines(tmp_path: Path) -> None:
    proc = write_proc(tmp_path / "proc", 8 << 30, "0::/\n")
    assert available_memory(proc, tmp_path / "none") == 8 << 30


def test_available_memory_is_bounded_by_every_enclosing_group_of_v2(tmp_path: Path) -> None:
    proc = write_proc(tmp_path / "proc", 8 << 30, "0::/pod/container\n")
    root = tmp_path / "cgroup"
    write_group(
        root / "pod",
        memory__max=str(3 << 30),
        memory__current=str(2 << 30),
        memory__stat="anon 5\ninactive_file 4096",
    )
    write_group(
        root / "pod/container", memory__max="max", memory__current="1", memory__stat="inactive_file 0"
    )
    assert available_memory(proc, root) == (1 << 30) + 4096


def test_available_memory_reads_v1_and_a_path_that_only_the_host_has(tmp_path: Path) -> None:
    proc = write_proc(tmp_path / "proc", 8 << 30, "4:memory:/docker/abc\n0::/\n")
    root = tmp_path / "cgroup"
    write_group(
        root / "memory",
        memory__limit_in_bytes=str(2 << 30),
        memory__usage_in_bytes=str(1 << 30),
        memory__stat="inactive_file 1\ntotal_inactive_file 8192",
    )
    assert available_memory(proc, root) == (1 << 30) + 8192


def test_available_memory_of_this_machine_is_plausible() -> None:
    assert 1 << 20 < available_memory() < 1 << 46
