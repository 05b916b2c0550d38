"""Where device memory comes from: CUDA, or what tests have in its place where there is no GPU."""

from __future__ import annotations

from pathlib import Path

from muxserve.engine.cuda.runtime import CudaRuntime, cuda_runtime

FAKE_BYTES = 256 << 20
"""Of the device that is none."""


def runtime(device: str, folder: Path, pid: int | None = None) -> CudaRuntime:
    """CuPy's on "cuda"; on "cpu", memory that processes share through files in `folder`. pid: of the process
    that it is to pass for there."""
    if device == "cuda":
        return cuda_runtime()
    from tests.engine.cuda.fake import FakeRuntime  # what a GPU has no use for

    return FakeRuntime(folder, FAKE_BYTES, pid=pid)
