"""Small random models, and one worker that most tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from muxserve.worker.cuda_device import CudaDevice
from muxserve.worker.settings import WorkerSettings
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.model_factory import make_model
from tests.worker.gpu import cuda
from tests.worker.harness import Harness, running_worker


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 64, 3 layers of 2 KV heads: 6 blocks for 8 tokens in float32 with blocks of 4 KiB."""
    return make_model("llama", tmp_path_factory.mktemp("llama"), head_dim=64, seed=1)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another family and head size."""
    return make_model("qwen3", tmp_path_factory.mktemp("qwen"), head_dim=80, seed=2)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of it takes milliseconds, a layer of a prompt of 500 tokens tens of them."""
    overrides = {"intermediate_size": 16384}
    return make_model("llama", tmp_path_factory.mktemp("wide"), head_dim=64, seed=1, overrides=overrides)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(llama: Path, qwen: Path) -> AsyncIterator[Harness]:
    """A worker with "llama" in float32 and "qwen" in bfloat16."""
    async with running_worker(cores=2) as harness:
        await harness.load("llama", llama)
        await harness.load("qwen", qwen, dtype="bfloat16")
        yield harness


@pytest_asyncio.fixture(loop_scope="session")
async def worker(shared: Harness) -> AsyncIterator[Harness]:
    """That worker; after the test nothing may be left in its pool."""
    yield shared
    await shared.assert_idle()


@pytest_asyncio.fixture(loop_scope="session")
async def loaded_wide(worker: Harness, wide: Path) -> AsyncIterator[Path]:
    """That worker has "wide" too, during the test."""
    await worker.load("wide", wide)
    yield wide
    await worker.unload("wide")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory that is a device to all processes of the test."""
    path = tmp_path / "device"
    path.mkdir()
    return path


@pytest.fixture
def fake(directory: Path) -> Iterator[FakeRuntime]:
    """The worker's runtime; in the end nobody has done wrong, and nothing is left."""
    runtime = FakeRuntime(directory)
    yield runtime
    runtime.check()
    assert runtime.memGetInfo() == (64 * MIB, 64 * MIB)


@pytest.fixture
def gpu(directory: Path, fake: FakeRuntime, llama: Path) -> Callable[[WorkerSettings], CudaDevice]:
    """What makes the worker's device."""
    return lambda settings: CudaDevice(settings, cuda(directory, llama, fake))
