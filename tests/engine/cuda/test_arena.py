"""CudaArena over a small CUDA of our own and, where there is a GPU, over the real one in two processes."""

from __future__ import annotations

import ctypes.util
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from muxserve.engine.arena import Arena, ArenaError
from muxserve.engine.arena_cuda import CudaArena, CudaRuntime, DeviceBytes, cuda_runtime
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.messages import AttachArena
from muxserve.engine.spec import KVLayout

MIB = 1 << 20


class Device:
    """What processes see of one device: its free memory, and how often each exported allocation is open."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.opened: dict[bytes, int] = {}
        self.numbers = itertools.count(1)


class Process:
    """One process's CUDA runtime: CUDA's rules for cudaMalloc and IPC handles, without memory behind them."""

    def __init__(self, device: Device, *, ipc: bool = True) -> None:
        self.device = device
        self.ipc = ipc
        self.allocated: dict[int, int] = {}
        self.exported: dict[int, bytes] = {}
        self.mapped: dict[int, bytes] = {}

    def getDeviceCount(self) -> int:
        return 1

    def setDevice(self, device: int) -> None:
        if device != 0:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def memGetInfo(self) -> tuple[int, int]:
        return self.device.free, self.device.free

    def malloc(self, size: int) -> int:
        pointer = next(self.device.numbers) << 21
        self.device.free -= size
        self.allocated[pointer] = size
        return pointer

    def free(self, pointer: int) -> None:
        handle = self.exported.pop(pointer, b"")
        assert not self.device.opened.pop(handle, 0), "the owner closes last"
        self.device.free += self.allocated.pop(pointer)

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        if not self.ipc:
            raise RuntimeError("cudaErrorNotSupported: operation not supported")
        handle = self.exported[pointer] = pointer.to_bytes(64, "little")
        self.device.opened.setdefault(handle, 0)
        return handle

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        if handle in self.exported.values():
            raise RuntimeError("cudaErrorInvalidContext: invalid device context")
        if handle not in self.device.opened:
            raise RuntimeError("cudaErrorMapBufferObjectFailed: mapping of buffer object failed")
        self.device.opened[handle] += 1
        pointer = next(self.device.numbers) << 21
        self.mapped[pointer] = handle
        return pointer

    def ipcCloseMemHandle(self, pointer: int) -> None:
        self.device.opened[self.mapped.pop(pointer)] -= 1


def test_an_owner_and_its_importers_leave_nothing_open() -> None:
    device = Device(16 * MIB)
    owner, others = Process(device), [Process(device), Process(device)]
    arena: Arena = CudaArena.create(10 * MIB + 5, 4096, runtime=owner)
    assert (arena.blocks, arena.block_bytes, arena.fd) == (2560, 4096, -1)
    assert device.free == 6 * MIB
    descriptor = arena.descriptor()
    assert len(descriptor.cuda_handle) == 64
    attached = [CudaArena.attach(descriptor, runtime=process) for process in others]
    assert device.opened == {descriptor.cuda_handle: 2}
    assert all((a.blocks, a.block_bytes) == (2560, 4096) for a in attached)
    for opened in [*attached, arena]:
        opened.close()
        opened.close()
    assert device.free == 16 * MIB
    assert device.opened == {}


def test_the_process_that_made_an_arena_cannot_attach_to_it() -> None:
    process = Process(Device(16 * MIB))
    arena = CudaArena.create(MIB, 4096, runtime=process)
    with pytest.raises(ArenaError, match="invalid device context"):
        CudaArena.attach(arena.descriptor(), runtime=process)
    arena.close()


def test_attaching_to_an_arena_that_has_gone_is_refused() -> None:
    device = Device(16 * MIB)
    arena = CudaArena.create(MIB, 4096, runtime=Process(device))
    arena.close()
    with pytest.raises(ArenaError, match="mapping of buffer object failed"):
        CudaArena.attach(arena.descriptor(), runtime=Process(device))


def test_an_arena_that_cannot_be_is_refused_and_takes_nothing() -> None:
    device = Device(16 * MIB)
    for process, size, block_bytes, number, field, reason in (
        (Process(device), 17 * MIB, 4096, 0, "arena", "17 MiB are asked for, 16 MiB are available"),
        (Process(device), MIB, 4000, 0, "block_bytes", "multiple of 64"),
        (Process(device), MIB, 4096, 1, "device", "invalid device ordinal"),
        (Process(device, ipc=False), MIB, 4096, 0, "arena", "not supported"),
    ):
        with pytest.raises(ArenaError, match=reason) as caught:
            CudaArena.create(size, block_bytes, number, runtime=process)
        assert caught.value.field == field
    assert device.free == 16 * MIB


def test_a_view_names_the_whole_arena_and_a_closed_arena_has_none() -> None:
    process = Process(Device(16 * MIB))
    arena = CudaArena.create(MIB, 4096, runtime=process)
    view = DeviceBytes(arena).__cuda_array_interface__
    assert view["shape"] == (MIB,)
    assert view["data"][0] in process.allocated
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        _ = DeviceBytes(arena).__cuda_array_interface__


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_refusal_says_what_to_install() -> None:
    with pytest.raises(ArenaError, match=r"device: CUDA needs CuPy \(install muxserve\[cuda\]\)"):
        CudaArena.create(MIB, 4096)


CHILD = """
import sys
import torch
from muxserve.engine.arena_cuda import CudaArena
from muxserve.engine.messages import AttachArena
block_bytes, blocks, handle = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
arena = CudaArena.attach(AttachArena(block_bytes=block_bytes, blocks=blocks, cuda_handle=handle))
bytes_ = arena.tensor()
assert bytes_.device.type == "cuda" and bytes_.shape == (block_bytes * blocks,)
assert bytes_[5].item() == 17
bytes_[-1] = 99
torch.cuda.synchronize()
del bytes_
arena.close()
"""


@pytest.fixture
def cuda() -> CudaRuntime:
    """The real runtime, or a skip with the reason."""
    import torch

    try:
        runtime = cuda_runtime()
    except ArenaError as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return runtime


@pytest.mark.gpu
def test_two_processes_share_one_allocation_through_its_handle(cuda: CudaRuntime) -> None:
    import torch

    before, _ = cuda.memGetInfo()
    arena = CudaArena.create(64 * MIB, 16384)
    shared = arena.tensor()
    shared[5], shared[-1] = 17, 0
    torch.cuda.synchronize()
    args = [sys.executable, "-c", CHILD, "16384", str(arena.blocks), arena.descriptor().cuda_handle.hex()]
    subprocess.run(args, check=True, timeout=120)
    assert shared[-1].item() == 99
    del shared
    arena.close()
    after, _ = cuda.memGetInfo()
    assert before - after < 64 * MIB


@pytest.mark.gpu
def test_cuda_itself_refuses_the_handle_in_its_own_process(cuda: CudaRuntime) -> None:
    arena = CudaArena.create(MIB, 4096)
    with pytest.raises(ArenaError):
        CudaArena.attach(arena.descriptor())
    arena.close()


@pytest.mark.gpu
def test_an_arena_larger_than_the_device_is_refused(cuda: CudaRuntime) -> None:
    _, total = cuda.memGetInfo()
    with pytest.raises(ArenaError, match="are available"):
        CudaArena.create(2 * total, 16384)


@pytest.mark.gpu
def test_a_models_blocks_are_a_view_of_the_device_arena(cuda: CudaRuntime) -> None:
    import torch

    arena = CudaArena.create(MIB, 4096)
    layout = KVLayout(layers=2, kv_heads=1, head_dim=80, dtype="bfloat16", block_bytes=4096)
    shared = arena.tensor()
    shared.zero_()
    table = torch.full((2, 1, 1, 4), -1, dtype=torch.int32, device="cuda")
    cache = KVCache.over(shared, table, layout)
    assert cache.blocks.shape == (256, 2, 12, 80)
    cache.blocks[3] = 1.0
    touched = shared.view(256, 4096).count_nonzero(dim=1).tolist()
    assert [i for i, count in enumerate(touched) if count] == [3]
    del cache, shared
    arena.close()


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a CUDA driver")
def test_the_gpu_check_is_content_without_a_gpu() -> None:
    script = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == "no GPU: no CUDA driver (libcuda.so.1)\n"


def test_a_descriptor_without_a_handle_is_not_a_cuda_arena() -> None:
    with pytest.raises(ArenaError, match="no CUDA IPC handle"):
        CudaArena.attach(AttachArena(block_bytes=4096, blocks=1), runtime=Process(Device(MIB)))
