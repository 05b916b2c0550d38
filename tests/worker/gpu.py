"""A GPU for a worker under test: a fake one, which all its processes share; see `device_processes`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.worker.cuda_device import Cuda
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.cuda.fake_driver import FakeDriver
from tests.worker.device_processes import next_token, salt
from tests.worker.harness import LIMIT, Harness

PROMPT = [7, 11, 13, 17, 19]
GPU = {"device": "cuda:0", "arena": 4 * MIB}


def cuda(directory: Path, path: Path | None, runtime: FakeRuntime, mps_program: str = "none") -> Cuda:
    """path: the checkpoint that the executor checks weights against; None: it computes."""
    module = "tests.worker.device_processes"
    role = ("interpreter", str(directory)) if path is None else ("executor", str(directory), str(path))
    return Cuda(
        runtime=runtime,
        driver=FakeDriver(),
        mps_program=mps_program,
        executor=(module, *role),
        loader=(module, "loader", str(directory)),
    )


def text(path: Path, prompt: list[int], new: int) -> list[int]:
    """What the executor should say."""
    told, salted = list(prompt), salt(open_checkpoint(path, "float32"))
    while len(told) < len(prompt) + new:
        told.append(next_token(told, salted))
    return told[len(prompt) :]


async def restarted(harness: Harness, pid: int) -> None:
    async with asyncio.timeout(LIMIT):
        while (await harness.info()).executors[0].pid in (0, pid):
            pass
