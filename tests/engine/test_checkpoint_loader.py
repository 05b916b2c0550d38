"""The loader process and the memory it fills."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.checkpoint.base import NUMPY_DTYPES
from muxserve.engine.weights import map_weights, weights_memfd
from tests.engine.model_factory import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("qwen3", tmp_path / "model")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = weights_memfd(1 << 22)
    yield fd
    os.close(fd)


def load(path: Path, dtype: str, fd: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "muxserve.engine.loader"]
    command += ["--path", str(path), "--dtype", dtype, "--fd", str(fd)]
    return subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_holds_what_the_checkpoint_says(model: Path, memfd: int, dtype: str) -> None:
    checkpoint = open_checkpoint(model, "float32" if dtype == "float32" else "bfloat16")
    result = load(model, dtype, memfd)
    assert (result.returncode, result.stderr) == (0, "")
    tensors = map_weights(memfd, checkpoint.manifest())
    assert tensors.keys() == {entry.name for entry in checkpoint.manifest()}
    memory = mmap.mmap(memfd, 0, prot=mmap.PROT_READ)
    for entry, (name, values) in zip(checkpoint.manifest(), checkpoint.tensors(), strict=True):
        stored = np.ndarray(entry.shape, NUMPY_DTYPES[entry.dtype], memory, entry.offset)
        np.testing.assert_array_equal(stored, values, err_msg=name)
        np.testing.assert_array_equal(tensors[name].float().numpy(), values.astype(np.float32))


def test_mapped_tensors_share_the_memory_and_outlive_the_descriptor(model: Path, memfd: int) -> None:
    checkpoint = open_checkpoint(model, "float32")
    fd = os.dup(memfd)
    tensors = map_weights(fd, checkpoint.manifest())
    os.close(fd)
    entry = checkpoint.manifest()[0]
    os.pwrite(memfd, np.float32(42).tobytes(), entry.offset)
    assert float(tensors[entry.name][0, 0]) == 42.0


def test_a_broken_checkpoint_is_one_json_object_and_exit_2(tmp_path: Path, memfd: int) -> None:
    result = load(tmp_path, "auto", memfd)
    assert result.returncode == 2
    report = json.loads(result.stderr.splitlines()[-1])
    assert report["field"] == "path" and "config.json" in report["reason"]


@pytest.mark.parametrize(("dtype", "field"), [("float32", "fd"), ("int3", "dtype")])
def test_other_refusals_name_their_field_too(model: Path, dtype: str, field: str) -> None:
    fd = weights_memfd(100)
    result = load(model, dtype, fd)
    os.close(fd)
    assert result.returncode == 2
    assert json.loads(result.stderr.splitlines()[-1])["field"] == field


def test_worker_side_imports_no_torch() -> None:
    code = (
        "import sys, muxserve.engine.checkpoint, muxserve.engine.loader, muxserve.engine.weights\n"
        "assert not {'torch', 'transformers', 'numba'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
