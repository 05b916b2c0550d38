"""Weights in device memory: filled once through little pinned memory, mapped, freed with the last user."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.checkpoint.base import Checkpoint, Piece
from muxserve.engine.cuda.filling import fill
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError
from muxserve.engine.cuda.weights import DeviceWeights, tensors_over
from muxserve.engine.messages import TensorEntry
from tests.engine.cuda.fake import MIB, FakeRuntime
from tests.engine.cuda.processes import start
from tests.engine.model_factory import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_model("qwen3", tmp_path_factory.mktemp("model")), "bfloat16")


def filled(
    checkpoint: Checkpoint, runtime: CudaRuntime | None, threads: int = 2, staging: int = 16 * MIB
) -> DeviceWeights:
    weights = DeviceWeights.create(checkpoint.manifest(), runtime=runtime)
    fill(checkpoint, weights.memory, threads, staging)
    return weights


def check_tensors(weights: DeviceWeights, checkpoint: Checkpoint) -> None:
    tensors = weights.tensors()
    assert tensors.keys() == {entry.name for entry in checkpoint.manifest()}
    for name, values in checkpoint.tensors():
        assert str(tensors[name].dtype) == f"torch.{values.dtype}"
        np.testing.assert_array_equal(
            tensors[name].float().cpu().numpy(), values.astype(np.float32), err_msg=name
        )


@pytest.mark.parametrize(("threads", "staging"), [(1, MIB), (3, 3 * 2 * 4096), (2, 2 * 2 * 999)])
def test_the_device_holds_what_the_checkpoint_says(
    fake: FakeRuntime, checkpoint: Checkpoint, threads: int, staging: int
) -> None:
    """Also through buffers that are smaller than a piece, and of an odd size."""
    weights = filled(checkpoint, fake, threads=threads, staging=staging)
    assert fake.most_pinned <= staging
    check_tensors(weights, checkpoint)
    weights.release()


EXECUTOR = """
import sys
from pathlib import Path
import msgspec
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.messages import TensorEntry
from tests.engine.cuda.fake import FakeRuntime
runtime = FakeRuntime(Path(sys.argv[1]))
manifest = msgspec.json.decode(sys.argv[3], type=tuple[TensorEntry, ...])
weights = DeviceWeights.attach(bytes.fromhex(sys.argv[2]), manifest, runtime=runtime)
print(float(sum(tensor.double().abs().sum() for tensor in weights.tensors().values())))
weights.release()
runtime.check()
"""


def test_executors_map_the_same_weights(fake: FakeRuntime, device: Path, checkpoint: Checkpoint) -> None:
    import msgspec

    weights = filled(checkpoint, fake)
    wanted = float(sum(t.double().abs().sum() for t in weights.tensors().values()))
    arguments = [str(device), weights.handle.hex(), msgspec.json.encode(weights.manifest).decode()]
    executors = [start(EXECUTOR, *arguments, stdout=-1) for _ in range(2)]
    for executor in executors:
        out, _ = executor.communicate(timeout=120)
        assert (executor.returncode, float(out)) == (0, wanted)
    weights.release()


def test_the_last_user_frees_the_weights(fake: FakeRuntime, checkpoint: Checkpoint) -> None:
    free = fake.memGetInfo()[0]
    weights = DeviceWeights.create(checkpoint.manifest(), runtime=fake)
    weights.retain()
    weights.release()
    assert fake.memGetInfo()[0] < free
    weights.release()
    assert (weights.users, fake.memGetInfo()[0]) == (0, free)
    for late in (weights.retain, weights.release, weights.tensors):
        with pytest.raises(DeviceError, match="weights:"):
            late()


def test_weights_that_do_not_fit_are_refused_and_take_nothing(device: Path, checkpoint: Checkpoint) -> None:
    small = FakeRuntime(device, total=2 * MIB)
    other = DeviceMemory.create(1, "arena", runtime=small)
    with pytest.raises(DeviceError, match="weights: 2 MiB are asked for, 0 MiB are available"):
        DeviceWeights.create(checkpoint.manifest(), runtime=small)
    other.close()
    with pytest.raises(DeviceError, match="device: CUDA device 3"):
        DeviceWeights.create(checkpoint.manifest(), 3, runtime=small)
    small.check()


def test_memory_or_staging_that_is_too_small_is_refused(fake: FakeRuntime, checkpoint: Checkpoint) -> None:
    memory = DeviceMemory.create(64, "weights", runtime=fake)
    with pytest.raises(DeviceError, match="64 bytes of memory for weights of"):
        fill(checkpoint, memory)
    memory.close()
    with pytest.raises(DeviceError, match="3 bytes of staging are too few"):
        filled(checkpoint, fake, threads=2, staging=3)
    fake.free(next(iter(fake._views)))


class Damaged(Checkpoint):
    """Cannot be read after a few pieces; other threads are at work then, on pieces that take a while."""

    def __init__(self, whole: Checkpoint) -> None:
        self._whole = whole
        self._reads = itertools.count(1)
        self.read_after = 0

    def pieces(self, layout: Any) -> Iterator[Piece]:
        return self._whole.pieces(layout)

    def manifest(self, layout: Any = "canonical") -> tuple[TensorEntry, ...]:
        return self._whole.manifest(layout)

    def read(self, piece: Piece) -> Any:
        number = next(self._reads)
        if number == 4:
            raise OSError("the disk has gone")
        if number > 4:
            self.read_after += 1  # by the one thread that is left
            time.sleep(0.1)
        return self._whole.read(piece)


def test_a_file_that_turns_bad_ends_the_filling_and_gives_everything_back(
    fake: FakeRuntime, checkpoint: Checkpoint
) -> None:
    weights = DeviceWeights.create(checkpoint.manifest(), runtime=fake)
    damaged = Damaged(checkpoint)
    with pytest.raises(OSError, match="the disk has gone"):
        fill(damaged, weights.memory, threads=2)
    weights.release()
    left = len(list(checkpoint.pieces("canonical"))) - 4
    assert damaged.read_after < left / 2, "the other thread has stopped too"


def test_a_manifest_that_leaves_its_memory_is_refused() -> None:
    memory = torch.zeros(128, dtype=torch.uint8)
    inside = TensorEntry(name="a", dtype="float32", shape=(4, 8), offset=0)
    assert tensors_over(memory, [inside])["a"].shape == (4, 8)
    for shape, offset in (((4, 9), 0), ((4, 8), 64), ((1,), -64)):
        with pytest.raises(DeviceError, match="a ends at byte"):
            tensors_over(memory, [TensorEntry(name="a", dtype="float32", shape=shape, offset=offset)])


@pytest.mark.gpu
def test_weights_on_a_gpu_are_what_the_checkpoint_says(cuda: CudaRuntime, checkpoint: Checkpoint) -> None:
    weights = filled(checkpoint, cuda, threads=2, staging=MIB)
    check_tensors(weights, checkpoint)
    weights.release()
