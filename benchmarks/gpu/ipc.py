"""Device memory across processes: one writes what another reads, the owner's death is noticed, all is freed.

As a program, `python -m benchmarks.gpu.ipc ROLE DEVICE FOLDER …`, it is the other processes: `attach` maps an
arena, checks it and writes to it; `own` has an arena and starts a `watch`, which maps it and waits for the
end of its owner.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.runtimes import runtime
from muxserve.engine.arena import ArenaError
from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.owner import Owner
from muxserve.engine.messages import AttachArena

BLOCK_BYTES = 16 * 1024
FIRST, SECOND = 0x0101, 0x0202
"""Added to its number by whoever writes a word."""
PATIENCE = 60.0


def run(context: Context) -> dict[str, Any]:
    """size: bytes of the arena."""
    size = (1 << 30) if not context.tiny else (4 << 20)
    found: dict[str, Any] = {"size": size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuda = runtime(context.device, folder)
        cuda.setDevice(0)
        _warm_up(context)
        before, _ = cuda.memGetInfo()
        context.keep(found, "an arena that another process maps")
        begun = time.perf_counter()
        arena = CudaArena.create(size, BLOCK_BYTES, runtime=cuda)
        found["create_s"] = time.perf_counter() - begun
        try:
            found |= _shared(context, arena, folder)
        finally:
            arena.close()
        if context.cuda:
            torch.cuda.empty_cache()
        found["unfreed_bytes"] = before - cuda.memGetInfo()[0]
        context.keep(found, "an owner that dies")
        found |= _orphaned(context, folder, size)
        # What the dead had is the driver's to free, which it does in its own time.
        ends = time.monotonic() + 5
        while before - cuda.memGetInfo()[0] > 0 and time.monotonic() < ends:
            select.select([], [], [], 0.05)
        found["unfreed_after_death_bytes"] = before - cuda.memGetInfo()[0]
    context.keep(found)
    return found


def _warm_up(context: Context) -> None:
    """What torch takes for itself, once, is not the arena's."""
    words = torch.arange(1 << 16, device=context.torch_device)
    words[:4] = -1
    bool((words + FIRST == words).all())
    if context.cuda:
        torch.cuda.empty_cache()


def _shared(context: Context, arena: CudaArena, folder: Path) -> dict[str, Any]:
    """This process writes one half, the other one checks it and writes the other half."""
    words = arena.tensor().view(torch.int64)
    half = len(words) // 2
    words[:half] = torch.arange(half, device=words.device) + FIRST
    words[half:] = -1
    if context.cuda:
        torch.cuda.synchronize()
    handle, blocks = arena.descriptor().cuda_handle.hex(), str(arena.blocks)
    with _process("attach", context.device, folder, handle, blocks) as (process, out):
        seconds = float(_line(out, "attached").split()[1])
        _line(out, "written")
        right = bool((words[half:] == torch.arange(half, device=words.device) + SECOND).all())
        process.communicate("done\n", timeout=PATIENCE)
    return {"attach_s": seconds, "right": right, "other_process_ended_with": process.returncode}


def _orphaned(context: Context, folder: Path, size: int) -> dict[str, Any]:
    """The owner is killed; how long it took until the process that maps its memory knew."""
    with _process("own", context.device, folder, str(size)) as (process, out):
        _line(out, "watching")
        begun = time.perf_counter()
        process.send_signal(signal.SIGKILL)
        _line(out, "owner ended")
        noticed = time.perf_counter() - begun
        unmapped = _line(out, "unmapped").removeprefix("unmapped").strip()
        process.wait(PATIENCE)
    return {"death_noticed_s": noticed, "error_of_unmapping": unmapped}


@contextmanager
def _process(role: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Of this module; its end is waited for."""
    command = [sys.executable, "-m", __name__, role, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _line(out: IO[str], begins: str) -> str:
    """The next line. Raises RuntimeError if it is another. A process that says nothing is ended with the
    section, when its time is over."""
    line = out.readline()
    if not line.startswith(begins):
        raise RuntimeError(f"{line!r} instead of {begins!r}")
    return line


def _say(*words: object) -> None:
    print(*words, flush=True)


def _attach(device: str, folder: Path, handle: str, blocks: str) -> None:
    descriptor = AttachArena(block_bytes=BLOCK_BYTES, blocks=int(blocks), cuda_handle=bytes.fromhex(handle))
    cuda = runtime(device, folder)
    cuda.setDevice(0)
    cuda.memGetInfo()  # makes the context, which takes longer than all else
    begun = time.perf_counter()
    arena = CudaArena.attach(descriptor, runtime=cuda)
    _say("attached", time.perf_counter() - begun)
    words = arena.tensor().view(torch.int64)
    half = len(words) // 2
    numbers = torch.arange(half, device=words.device)
    if not (words[:half] == numbers + FIRST).all():
        raise AssertionError("what the owner wrote is not there")
    words[half:] = numbers + SECOND
    if words.is_cuda:
        torch.cuda.synchronize()
    _say("written")
    sys.stdin.readline()
    arena.close()


def _own(device: str, folder: Path, size: str) -> None:
    arena = CudaArena.create(int(size), BLOCK_BYTES, runtime=runtime(device, folder))
    handle = arena.descriptor().cuda_handle.hex()
    command = [sys.executable, "-m", "benchmarks.gpu.ipc", "watch", device, str(folder), handle]
    subprocess.Popen([*command, str(arena.blocks)]).wait()


def _watch(device: str, folder: Path, handle: str, blocks: str) -> None:
    owner = Owner(os.getppid())
    descriptor = AttachArena(block_bytes=BLOCK_BYTES, blocks=int(blocks), cuda_handle=bytes.fromhex(handle))
    arena = CudaArena.attach(descriptor, runtime=runtime(device, folder))
    _say("watching")
    select.select([owner], [], [])
    _say("owner ended")
    owner.close()
    try:
        arena.close()
    except ArenaError as error:  # what CUDA does with memory that is gone is its own affair
        _say("unmapped", error)
    else:
        _say("unmapped")


ROLES: dict[str, Callable[..., None]] = {"attach": _attach, "own": _own, "watch": _watch}

if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
