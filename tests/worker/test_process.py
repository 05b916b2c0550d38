"""The worker as a process: how it starts, how it ends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from muxserve.common.errors import Unavailable
from muxserve.common.registry import Registry
from muxserve.common.rpc import channel
from muxserve.common.store import connect
from muxserve.v1 import admin_pb2, common_pb2, worker_pb2, worker_pb2_grpc
from muxserve.worker.service import WorkerServicer
from muxserve.worker.settings import WorkerSettings
from muxserve.worker.worker import Worker
from tests.support.valkey import ValkeyProcess
from tests.worker.harness import LIMIT, Harness

PROMPT = [7, 11, 13, 17, 19]


class Process:
    """`python -m muxserve.worker` as `up` starts it."""

    def __init__(self, valkey: ValkeyProcess, log: Path) -> None:
        settings = {
            "id": "worker-p",
            "redis_url": valkey.url,
            "arena": "8MiB",
            "block_bytes": 4096,
            "cores": 1,
        }
        flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "muxserve.worker", *flags], stdout=output, stderr=output
            )
        self.log = log

    async def entry(self, registry: Registry) -> admin_pb2.ServiceEntry:
        """Its entry in the registry, once it is ready."""
        async with asyncio.timeout(LIMIT):
            while not (entries := await registry.list("worker")):
                assert self.process.poll() is None, self.log.read_text()
        return entries[0]

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_worker_that_ends_leaves_no_process(
    valkey: ValkeyProcess, tmp_path: Path, llama: Path, how: signal.Signals
) -> None:
    worker = Process(valkey, tmp_path / "worker.log")
    client = connect(valkey.url)
    family: list[psutil.Process] = []
    try:
        entry = await worker.entry(Registry(client))
        assert entry.pid == worker.process.pid
        async with channel(entry.address) as connection:
            stub = worker_pb2_grpc.WorkerServiceStub(connection)
            harness = Harness(None, stub, entry.address)  # type: ignore[arg-type]
            await harness.load("llama", llama)
            family = worker.family()
            assert len(family) == 3
            async with harness.stream() as stream:
                number = await stream.open("llama", PROMPT, 400)
                await stream.prefill("llama", {number: (0, 5)})
                await stream.first_step(await stream.start_decode("llama", [number], 399))
                os.kill(worker.process.pid, how)
                await stream.closed()
        code = await asyncio.to_thread(worker.process.wait, 10)
        assert code == (0 if how is signal.SIGTERM else -signal.SIGKILL), worker.log.read_text()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family[1:], 5)
        assert not alive
        if how is signal.SIGTERM:
            assert await Registry(client).list("worker") == []
    finally:
        await client.aclose()
        worker.process.kill()
        worker.process.wait()


async def test_a_worker_that_starts_takes_no_orders(llama: Path) -> None:
    worker = Worker(WorkerSettings(id="w", arena=8 * 2**20, block_bytes=4096, cores=1), "one")
    servicer: Any = WorkerServicer(worker)
    request = worker_pb2.LoadModelRequest(model=common_pb2.ModelConfig(name="llama", path=str(llama)))
    try:
        with pytest.raises(Unavailable, match="starting"):
            await servicer.LoadModel(request, None)
        await worker.start()
        assert (await servicer.LoadModel(request, None)).shape.weight_bytes > 0
    finally:
        await worker.stop()


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    for setting, word in [("arena=1000TiB", "arena"), ("arena=5", "arena"), ("cores=0", "cores")]:
        command = [sys.executable, "-m", "muxserve.worker", "--set", "id=w", "--set", setting]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert ended.returncode in (1, 2)
        assert word in ended.stderr
        assert "Traceback" not in ended.stderr


def test_the_worker_does_not_import_torch() -> None:
    modules = "muxserve.worker.__main__, muxserve.worker.cuda_device, muxserve.worker.loader_process"
    absent = {"torch", "cupy", "cuda", "triton", "transformers"}
    code = f"import sys, {modules}; assert not {absent} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)
