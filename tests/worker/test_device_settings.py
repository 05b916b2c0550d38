"""Which device a worker computes on, by what means jobs share it, and who hears of what cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from muxserve.engine.cuda.runtime import DeviceError
from muxserve.worker.cuda_device import CudaDevice, mps_directory
from muxserve.worker.settings import WorkerSettings
from tests.engine.cuda.fake import FakeRuntime
from tests.engine.cuda.test_mps import ended, program, running
from tests.worker.gpu import GPU, PROMPT, cuda, text
from tests.worker.harness import LIMIT, running_worker


def settings(**values: object) -> WorkerSettings:
    return WorkerSettings(id="w", **{**GPU, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"device": "tpu"}, "'tpu' is neither cpu nor cuda"),
        ({"device": "cuda:x"}, "'cuda:x' is neither cpu nor cuda"),
        ({"device": "cpu", "partition": "mps"}, "partition: mps is for a GPU"),
        ({"device": "cuda", "partition": "threads"}, "partition: threads are for cpu"),
        ({"partition": "some"}, "partition\n  Input should be"),
        ({"mps_decode": 0}, "mps_decode"),
    ],
)
def test_a_bad_setting_is_named(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(**values)
    assert reason in str(refused.value)


def test_a_partition_that_the_device_does_not_offer_is_named_and_takes_no_memory(
    directory: Path, fake: FakeRuntime, llama: Path
) -> None:
    with pytest.raises(DeviceError, match="partition: mps cannot be had: nvidia-cuda-mps-control is not"):
        CudaDevice(settings(partition="mps"), cuda(directory, llama, fake))


async def test_with_mps_there_are_two_executors_each_with_its_percentage(
    directory: Path, fake: FakeRuntime, llama: Path, tmp_path: Path
) -> None:
    control = program(tmp_path)
    settings = {**GPU, "partition": "mps", "mps_prefill": 70, "mps_decode": 40, "id": f"mps-{os.getpid()}"}

    def make(settings: WorkerSettings) -> CudaDevice:
        return CudaDevice(settings, cuda(directory, llama, fake, control))

    async with running_worker(make, **settings) as harness:
        folder = mps_directory(harness.worker.settings)
        daemon = running(folder)
        info = await harness.info()
        assert info.partition == "mps"
        found = {}
        for each in info.executors:
            environment = psutil.Process(each.pid).environ()
            assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(folder / "pipe")
            found[each.kind] = environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]
        assert found == {"prefill": "70", "decode": "40"}
        await harness.load("llama", llama)
        async with harness.stream() as stream:
            assert await stream.generate("llama", [PROMPT], 20) == [text(llama, PROMPT, 20)]
    assert ended(daemon)
    assert not folder.exists()
    os.close(daemon)


def test_a_machine_without_a_gpu_says_so() -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is one here")
    command = [sys.executable, "-m", "muxserve.worker", "--set", "id=w", "--set", "device=cuda"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ended.returncode == 1
    assert "device: " in ended.stderr
    assert "Traceback" not in ended.stderr
