"""A worker that computes on a GPU, with a fake one in its place that all its processes share: it owns arena
and weights there, one executor takes jobs of both kinds, and nothing is left when it has ended."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from structlog.testing import capture_logs

from muxserve.engine import loader
from muxserve.engine.cuda.runtime import DeviceError, cuda_runtime
from muxserve.worker.cuda_device import CudaDevice
from muxserve.worker.device import open_device
from muxserve.worker.settings import WorkerSettings
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.cuda.processes import start
from tests.worker.gpu import GPU, PROMPT, cuda, restarted, text
from tests.worker.harness import LIMIT, running_worker
from tests.worker.random_orders import give_random_orders

MakeDevice = Callable[[WorkerSettings], CudaDevice]


async def test_a_model_comes_speaks_and_goes(gpu: MakeDevice, fake: FakeRuntime, llama: Path) -> None:
    async with running_worker(gpu, **GPU) as harness:
        info = await harness.info()
        assert (info.device, info.partition, info.compute_units) == ("fake GPU", "green_contexts", 132)
        assert [executor.kind for executor in info.executors] == ["both"]
        assert not info.prompts_join
        empty, _ = fake.memGetInfo()
        assert empty == 60 * MIB
        assert info.weight_budget_bytes == int(0.9 * empty)
        shape = await harness.load("llama", llama)
        loaded, _ = fake.memGetInfo()
        assert shape.weight_bytes <= empty - loaded
        await harness.load("again", llama)
        assert fake.memGetInfo()[0] == loaded, "one checkpoint is loaded once"
        async with harness.stream() as stream:
            prompts = [PROMPT, PROMPT * 20, [3]]
            said = await stream.generate("llama", prompts, 20, chunk=30)
            assert said == [text(llama, prompt, 20) for prompt in prompts]
            assert await stream.generate("again", prompts, 20) == said
        await harness.assert_idle()
        await harness.unload("llama")
        assert fake.memGetInfo()[0] == loaded
        await harness.unload("again")
        assert fake.memGetInfo()[0] == empty


async def test_a_gpu_says_what_cores_say(directory: Path, fake: FakeRuntime, llama: Path, qwen: Path) -> None:
    """With the runner of a GPU, its kernels interpreted, and all that is around it."""
    prompts, models = [PROMPT, PROMPT[1:] * 3], {"llama": llama, "qwen": qwen}
    said = []
    for make in (open_device, lambda settings: CudaDevice(settings, cuda(directory, None, fake))):
        device = {} if make is open_device else GPU
        async with running_worker(make, **device) as harness:
            for name, path in models.items():
                await harness.load(name, path, dtype="float32")
            async with harness.stream() as stream:
                texts = [stream.generate(name, prompts, 4, chunk=8) for name in models]
                said.append(await asyncio.gather(*texts))
            await harness.assert_idle()
    assert said[0] == said[1]


async def test_one_executor_runs_a_prefill_beside_a_decode_job(gpu: MakeDevice, llama: Path) -> None:
    async with running_worker(gpu, **GPU) as harness:
        await harness.load("llama", llama)
        async with harness.stream() as stream:
            first, second = [await stream.open("llama", PROMPT, 400) for _ in range(2)]
            await stream.prefill("llama", {first: (0, 5)})
            decode = await stream.start_decode("llama", [first], 399, 0.5)
            result = await stream.first_step(decode)
            prefill = await stream.start_prefill("llama", {second: (0, 5)}, 0.5)
            assert (await stream.result(prefill)).outcome == "OK"
            await stream.decode("llama", [], 1)  # waits for the one that runs
            assert stream.ended.index(prefill) < stream.ended.index(decode)
            assert result.tokens == {first: text(llama, PROMPT, 400)[1:]}


async def test_an_executor_that_dies_loses_its_jobs_of_both_kinds_and_comes_back(
    gpu: MakeDevice, llama: Path
) -> None:
    async with running_worker(gpu, **GPU) as harness:
        await harness.load("llama", llama)
        async with harness.stream() as stream:
            first, second = [await stream.open("llama", prompt, 300) for prompt in (PROMPT, PROMPT * 40)]
            await stream.prefill("llama", {first: (0, 5)})
            jobs = [await stream.start_decode("llama", [first], 299, 0.5)]
            await stream.first_step(jobs[0])
            jobs.append(await stream.start_prefill("llama", {second: (0, 200)}, 0.5))
            pid = (await harness.info()).executors[0].pid
            os.kill(pid, signal.SIGKILL)
            assert {(await stream.result(job)).outcome for job in jobs} == {"EXECUTOR_LOST"}
            await restarted(harness, pid)
            assert await stream.generate("llama", [PROMPT], 20) == [text(llama, PROMPT, 20)]
        assert (await harness.info()).executors[0].restarts == 1
        await harness.assert_idle()


async def test_whatever_a_scheduler_does_every_job_ends_and_every_block_comes_back(
    gpu: MakeDevice, llama: Path
) -> None:
    async with running_worker(gpu, **GPU) as harness:
        await harness.load("llama", llama)
        await give_random_orders(harness, PROMPT, seed=3)
        assert harness.worker.lanes.executors[0].restarts == 2
        async with harness.stream() as stream:
            assert await stream.generate("llama", [PROMPT], 20) == [text(llama, PROMPT, 20)]


async def test_weights_that_the_device_has_no_room_for_are_refused(
    gpu: MakeDevice, fake: FakeRuntime, llama: Path
) -> None:
    taken = fake.malloc(59 * MIB)
    async with running_worker(gpu, weight_budget=2**40, **GPU) as harness:
        with pytest.raises(grpc.aio.AioRpcError, match="are asked for, 1 MiB are available") as refused:
            await harness.load("llama", llama)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        fake.free(taken)
        await harness.load("llama", llama)


async def test_weights_come_back_from_their_copy_on_the_host(
    gpu: MakeDevice, fake: FakeRuntime, llama: Path, qwen: Path
) -> None:
    """The executor compares them with the checkpoint."""
    async with running_worker(gpu, weight_host_budget=8 * MIB, **GPU) as harness:
        kept = []
        for _ in range(2):
            with capture_logs() as logs:
                await harness.load("llama", llama)
            kept += [entry["from_cache"] for entry in logs if entry["event"] == "weights loaded"]
            async with harness.stream() as stream:
                assert await stream.generate("llama", [PROMPT], 20) == [text(llama, PROMPT, 20)]
            await harness.unload("llama")
            assert fake.memGetInfo()[0] == 60 * MIB
        assert kept == [False, True]


async def test_a_checkpoint_that_turns_out_broken_leaves_no_memory_behind(
    gpu: MakeDevice, fake: FakeRuntime, llama: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    async with running_worker(gpu, **GPU) as harness:
        await harness.inspect("llama", broken)
        (broken / "config.json").unlink()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await harness.load("llama", broken)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert fake.memGetInfo()[0] == 60 * MIB


async def test_a_load_that_is_given_up_leaves_no_memory_behind(
    gpu: MakeDevice, fake: FakeRuntime, llama: Path
) -> None:
    async with running_worker(gpu, **GPU) as harness:
        load = asyncio.create_task(harness.load("llama", llama))
        async with asyncio.timeout(LIMIT):
            while fake.memGetInfo()[0] == 60 * MIB:
                await harness.info()
        await harness.unload("llama")
        with pytest.raises(grpc.aio.AioRpcError) as given_up:
            await load
        assert given_up.value.code() == grpc.StatusCode.ABORTED
        assert fake.memGetInfo()[0] == 60 * MIB


def test_a_loader_says_what_is_wrong_with_the_device(
    fake: FakeRuntime, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--path", str(llama), "--dtype", "float32", "--handle", "ab" * 64, "--device", "5"]
    assert loader.main(arguments, fake) == 3
    said = json.loads(capsys.readouterr().err)
    assert said["field"] == "device"
    assert "cudaErrorInvalidDevice" in said["reason"]


WORKER = """
import asyncio, os, sys
from pathlib import Path
from muxserve.common.process import configure_logs
from muxserve.worker.cuda_device import CudaDevice
from tests.engine.cuda.fake import FakeRuntime
from tests.worker.harness import running_worker
from tests.worker.gpu import GPU, PROMPT, cuda

async def main(directory, path):
    made_of = cuda(directory, path, FakeRuntime(directory))
    async with running_worker(lambda settings: CudaDevice(settings, made_of), **GPU) as harness:
        await harness.load("llama", path)
        async with harness.stream() as stream:
            number = await stream.open("llama", PROMPT, 400)
            await stream.prefill("llama", {number: (0, 5)})
            await stream.first_step(await stream.start_decode("llama", [number], 399))
            print((await harness.info()).executors[0].pid, flush=True)
            await asyncio.Event().wait()

configure_logs("worker")
asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_when_the_worker_is_killed_its_executor_ends_and_its_memory_is_free(
    directory: Path, fake: FakeRuntime, llama: Path
) -> None:
    worker = start(WORKER, str(directory), str(llama), stdout=subprocess.PIPE)
    assert worker.stdout is not None
    try:
        executor = psutil.Process(int(worker.stdout.readline()))
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    _, alive = psutil.wait_procs([executor], 10)
    assert not alive


@pytest.mark.gpu
async def test_a_real_gpu_says_what_cores_say(llama: Path, qwen: Path) -> None:
    try:
        runtime = cuda_runtime()
    except DeviceError as error:
        pytest.skip(str(error))
    before, _ = runtime.memGetInfo()
    prompts, models = [PROMPT, PROMPT * 30], {"llama": llama, "qwen": qwen}
    said = []
    for device in ("cpu", "cuda"):
        async with running_worker(device=device) as harness:
            for name, path in models.items():
                await harness.load(name, path, dtype="float32")
            async with harness.stream() as stream:
                texts = [stream.generate(name, prompts, 30, chunk=100) for name in models]
                said.append(await asyncio.gather(*texts))
            pid = (await harness.info()).executors[0].pid
            os.kill(pid, signal.SIGKILL)
            await restarted(harness, pid)
            async with harness.stream() as stream:
                assert await stream.generate("qwen", prompts, 30) == said[-1][1]
            for name in models:
                await harness.unload(name)
            await harness.assert_idle()
    assert said[0] == said[1]
    assert abs(runtime.memGetInfo()[0] - before) < 64 * MIB, "of 0.5 GiB at least that its contexts took"
