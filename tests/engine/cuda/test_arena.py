"""CudaArena: what an arena adds to the device memory that it lies in."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muxserve.engine.arena import Arena, ArenaError
from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.cuda.runtime import CudaRuntime
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.messages import AttachArena
from muxserve.engine.spec import KVLayout
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.cuda.processes import run

ATTACH = """
import sys
from pathlib import Path
from muxserve.engine.cuda.arena import CudaArena
from muxserve.engine.messages import AttachArena
from tests.engine.cuda.fake import FakeRuntime
runtime = FakeRuntime(Path(sys.argv[1]))
block_bytes, blocks, handle = int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
arena = CudaArena.attach(
    AttachArena(block_bytes=block_bytes, blocks=blocks, cuda_handle=handle), runtime=runtime
)
assert (arena.block_bytes, arena.blocks, arena.fd) == (block_bytes, blocks, -1)
assert arena.tensor().view(blocks, block_bytes)[7, 0] == 7
arena.close()
runtime.check()
"""


def test_an_executor_finds_the_blocks_where_the_owner_has_them(fake: FakeRuntime, device: Path) -> None:
    arena: Arena = CudaArena.create(10 * MIB + 5, 4096, runtime=fake)
    assert (arena.blocks, arena.block_bytes, arena.fd) == (2560, 4096, -1)
    assert arena.tensor().shape == (10 * MIB,)
    arena.tensor().view(2560, 4096)[7] = 7
    run(ATTACH, str(device), "4096", "2560", arena.descriptor().cuda_handle.hex())
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.tensor()


def test_an_arena_that_cannot_be_is_refused_and_takes_nothing(fake: FakeRuntime) -> None:
    for size, block_bytes, number, field, reason in (
        (65 * MIB, 4096, 0, "arena", "66 MiB are asked for, 64 MiB are available"),
        (MIB, 4000, 0, "block_bytes", "multiple of 64"),
        (MIB, 4096, 1, "device", "invalid device ordinal"),
    ):
        with pytest.raises(ArenaError, match=reason) as caught:
            CudaArena.create(size, block_bytes, number, runtime=fake)
        assert caught.value.field == field


def test_a_descriptor_without_a_handle_is_not_a_cuda_arena(fake: FakeRuntime) -> None:
    with pytest.raises(ArenaError, match="no CUDA IPC handle"):
        CudaArena.attach(AttachArena(block_bytes=4096, blocks=1), runtime=fake)


def blocks_of_a_model(arena: CudaArena, device: str) -> None:
    layout = KVLayout(layers=2, kv_heads=1, head_dim=80, dtype="bfloat16", block_bytes=4096)
    shared = arena.tensor()
    shared.zero_()
    table = torch.full((2, 1, 1, 4), -1, dtype=torch.int32, device=device)
    cache = KVCache.over(shared, table, layout)
    assert cache.blocks.shape == (256, 2, 12, 80)
    cache.blocks[3] = 1.0
    touched = shared.view(256, 4096).count_nonzero(dim=1).tolist()
    assert [i for i, count in enumerate(touched) if count] == [3]


def test_a_models_blocks_are_a_view_of_the_arena(fake: FakeRuntime) -> None:
    arena = CudaArena.create(MIB, 4096, runtime=fake)
    blocks_of_a_model(arena, "cpu")
    arena.close()


@pytest.mark.gpu
def test_a_models_blocks_are_a_view_of_an_arena_on_a_gpu(cuda: CudaRuntime) -> None:
    arena = CudaArena.create(MIB, 4096)
    blocks_of_a_model(arena, "cuda")
    arena.close()


@pytest.mark.gpu
def test_an_arena_larger_than_the_device_is_refused(cuda: CudaRuntime) -> None:
    _, total = cuda.memGetInfo()
    with pytest.raises(ArenaError, match="are available"):
        CudaArena.create(2 * total, 16384)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a CUDA driver")
def test_the_gpu_check_is_content_without_a_gpu() -> None:
    script = Path(__file__).parents[3] / "scripts" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == "no GPU: no CUDA driver (libcuda.so.1)\n"
