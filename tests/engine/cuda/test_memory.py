"""DeviceMemory across processes: over the fake, whose memory is real, and over a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muxserve.engine.cuda.memory import GRANULE, DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError, cuda_runtime
from tests.engine.cuda.fake import DEAD, MIB, FakeRuntime
from tests.engine.cuda.processes import run

READ_AND_WRITE = """
import sys
from pathlib import Path
from muxserve.engine.cuda.memory import DeviceMemory
from tests.engine.cuda.fake import FakeRuntime
runtime = FakeRuntime(Path(sys.argv[1]))
memory = DeviceMemory.attach(bytes.fromhex(sys.argv[2]), 1000, "arena", runtime=runtime)
data = runtime.bytes(memory.pointer, memory.size)
assert data.shape == (1000,) and data[5] == 17
data[-1] = 99
del data
memory.close()
memory.close()
runtime.check()
"""


def test_what_one_process_writes_another_reads_and_nothing_is_left(fake: FakeRuntime, device: Path) -> None:
    memory = DeviceMemory.create(1000, "arena", runtime=fake)
    data = memory.tensor()
    data[5] = 17
    run(READ_AND_WRITE, str(device), memory.handle.hex())
    assert data[-1] == 99
    del data
    memory.close()
    memory.close()
    assert fake.memGetInfo() == (64 * MIB, 64 * MIB)


def test_no_two_allocations_share_a_granule(fake: FakeRuntime) -> None:
    """A handle would show one's neighbours to whoever opens it."""
    memory = DeviceMemory.create(GRANULE + 1, "weights", runtime=fake)
    assert (memory.size, fake.memGetInfo()[0]) == (GRANULE + 1, 64 * MIB - 2 * GRANULE)
    memory.close()


def test_closed_memory_has_neither_an_address_nor_a_view(fake: FakeRuntime) -> None:
    memory = DeviceMemory.create(1, "weights", runtime=fake)
    memory.close()
    for use in (memory.tensor, lambda: memory.pointer):
        with pytest.raises(DeviceError, match="weights: its memory is closed"):
            use()


def test_what_cannot_be_is_refused_and_takes_nothing(fake: FakeRuntime, device: Path) -> None:
    mine = DeviceMemory.create(1, "arena", runtime=fake)
    without_ipc = FakeRuntime(device, ipc=False)
    free = fake.memGetInfo()[0]
    for refused, field, reason in (
        (lambda: DeviceMemory.create(0, "weights", runtime=fake), "weights", "0 bytes"),
        (lambda: DeviceMemory.create(65 * MIB, "arena", runtime=fake), "arena", "66 MiB are asked for"),
        (lambda: DeviceMemory.create(1, "arena", 1, runtime=fake), "device", "invalid device ordinal"),
        (lambda: DeviceMemory.create(1, "weights", runtime=without_ipc), "weights", "not supported"),
        (lambda: DeviceMemory.attach(b"", 1, "arena", runtime=fake), "arena", "no CUDA IPC handle"),
        (
            lambda: DeviceMemory.attach(mine.handle, 1, "arena", runtime=fake),
            "arena",
            "invalid device context",
        ),
    ):
        with pytest.raises(DeviceError, match=reason) as caught:
            refused()
        assert caught.value.field == field
    assert fake.memGetInfo()[0] == free
    mine.close()
    without_ipc.check()


OWNER = """
import os, sys
from pathlib import Path
from muxserve.engine.cuda.memory import DeviceMemory
from tests.engine.cuda.fake import FakeRuntime
memory = DeviceMemory.create(100, "arena", runtime=FakeRuntime(Path(sys.argv[1])))
Path(sys.argv[2]).write_text(memory.handle.hex())
os._exit(0)
"""


def test_a_dead_owners_memory_is_free_again_and_its_handle_opens_no_more(
    device: Path, tmp_path: Path
) -> None:
    runtime, told = FakeRuntime(device), tmp_path / "handle"
    run(OWNER, str(device), str(told))
    assert runtime.memGetInfo() == (64 * MIB, 64 * MIB)
    with pytest.raises(DeviceError, match="mapping of buffer object failed"):
        DeviceMemory.attach(bytes.fromhex(told.read_text()), 100, "arena", runtime=runtime)


def test_the_fake_sees_what_cuda_would_let_pass(device: Path) -> None:
    """It is what the tests here rest on."""
    runtime = FakeRuntime(device)
    pointer = runtime.malloc(8)
    with pytest.raises(AssertionError):
        runtime.check()  # a leak
    runtime.bytes(pointer, 8)[:] = 1
    seen = runtime.bytes(pointer, 8)
    with pytest.raises(AssertionError, match="nobody's"):
        runtime.bytes(pointer, 9)
    runtime.free(pointer)
    assert set(seen) == {DEAD}
    with pytest.raises(RuntimeError, match="invalid argument"):
        runtime.free(pointer)
    with pytest.raises(AssertionError, match="is not allocated"):
        runtime.check()


def test_without_cupy_or_a_device_the_refusal_says_what_is_missing() -> None:
    """In whatever this machine lacks; a machine that lacks nothing has a runtime."""
    try:
        assert cuda_runtime().getDeviceCount() > 0
    except DeviceError as error:
        assert error.field == "device"
        assert "muxserve[cuda]" in error.reason or "no CUDA device" in error.reason


def imported_by(code: str) -> list[str]:
    """Which of torch, CuPy and the CUDA bindings a process has in the end."""
    code += "\nimport sys; print(*(m for m in ('torch', 'cupy', 'cuda') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_module_of_the_package_can_be_imported_without_cuda() -> None:
    every = (
        "import importlib, pkgutil, muxserve.engine.cuda as p\n"
        "for m in pkgutil.iter_modules(p.__path__): importlib.import_module(f'{p.__name__}.{m.name}')"
    )
    assert imported_by(every) == ["torch"]


def test_a_worker_on_a_gpu_has_no_torch() -> None:
    assert imported_by("import muxserve.worker.cuda_device, muxserve.worker.worker") == []


ON_A_GPU = """
import sys
import torch
from muxserve.engine.cuda.memory import DeviceMemory
memory = DeviceMemory.attach(bytes.fromhex(sys.argv[1]), 3 << 20, "arena")
data = memory.tensor()
assert data.device.type == "cuda" and data.shape == (3 << 20,)
assert data[5].item() == 17
data[-1] = 99
torch.cuda.synchronize()
del data
memory.close()
"""


@pytest.mark.gpu
def test_two_processes_share_one_allocation_through_its_handle(cuda: CudaRuntime) -> None:
    before, _ = cuda.memGetInfo()
    memory = DeviceMemory.create(3 * MIB, "arena")
    data = memory.tensor()
    data[5], data[-1] = 17, 0
    torch.cuda.synchronize()
    run(ON_A_GPU, memory.handle.hex())
    assert data[-1].item() == 99
    assert data.data_ptr() == memory.pointer
    del data
    memory.close()
    after, _ = cuda.memGetInfo()
    assert before - after < 4 * MIB


@pytest.mark.gpu
def test_cuda_itself_refuses_the_handle_in_its_own_process(cuda: CudaRuntime) -> None:
    memory = DeviceMemory.create(1, "arena")
    with pytest.raises(DeviceError):
        DeviceMemory.attach(memory.handle, 1, "arena")
    memory.close()
