"""A device for the tests of this folder, and the real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError, cuda_runtime
from tests.engine.cuda.fake import FakeRuntime


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """The directory that is a device to all processes of the test."""
    directory = tmp_path / "device"
    directory.mkdir()
    return directory


@pytest.fixture
def fake(device: Path) -> Iterator[FakeRuntime]:
    """This process's runtime; at the end, nobody has done wrong and nothing is left."""
    runtime = FakeRuntime(device)
    yield runtime
    runtime.check()


@pytest.fixture
def cuda() -> CudaRuntime:
    """The real runtime, or a skip with the reason."""
    import torch

    try:
        runtime = cuda_runtime()
    except DeviceError as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return runtime
