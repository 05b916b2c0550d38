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

from muxserve.engine.checkpoint import RequestedDType, open_checkpoint
from muxserve.engine.checkpoint.base import NUMPY_DTYPES
from muxserve.engine.packing import unpack
from muxserve.engine.weights import map_tensors, map_weights, weights_memfd
from tests.engine.model_factory import Family, make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("qwen3", tmp_path / "model")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = weights_memfd(1 << 22)
    yield fd
    os.close(fd)


def load(path: Path, dtype: str, fd: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "muxserve.engine.loader"]
    command += ["--path", str(path), "--dtype", dtype, "--fd", str(fd), *more]
    return subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_holds_what_the_checkpoint_says(model: Path, memfd: int, dtype: str) -> None:
    checkpoint = open_checkpoint(model, "float32" if dtype == "float32" else "bfloat16")
    result = load(model, dtype, memfd)
    assert (result.returncode, result.stderr) == (0, "")
    tensors = map_tensors(memfd, checkpoint.manifest())
    assert tensors.keys() == {entry.name for entry in checkpoint.manifest()}
    memory = mmap.mmap(memfd, 0, prot=mmap.PROT_READ)
    for entry, (name, values) in zip(checkpoint.manifest(), checkpoint.tensors(), strict=True):
        stored = np.ndarray(entry.shape, NUMPY_DTYPES[entry.dtype], memory, entry.offset)
        np.testing.assert_array_equal(stored, values, err_msg=name)
        np.testing.assert_array_equal(tensors[name].float().numpy(), values.astype(np.float32))


def test_mapped_tensors_share_the_memory_and_outlive_the_descriptor(model: Path, memfd: int) -> None:
    checkpoint = open_checkpoint(model, "float32")
    fd = os.dup(memfd)
    tensors = map_tensors(fd, checkpoint.manifest())
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packed_memory_holds_the_same_weights(
    tmp_path: Path, memfd: int, family: Family, dtype: RequestedDType
) -> None:
    """5 × 24 inner and 3 × 40 query rows: matrices that do not fill their last panel."""
    path = make_model(family, tmp_path / "odd", heads=3, kv_heads=1, head_dim=40, bias=family == "llama")
    checkpoint = open_checkpoint(path, dtype)
    spec = checkpoint.spec
    result = load(path, dtype, memfd, "--layout", "panels")
    assert (result.returncode, result.stderr) == (0, "")
    entries = checkpoint.manifest("panels")
    arrays = map_weights(memfd, entries)
    exact = dict(open_checkpoint(path, "float32").tensors())
    for entry, (name, values) in zip(entries, checkpoint.tensors(), strict=True):
        assert entry.name == name
        if values.ndim == 1:
            assert entry.dtype == "float32" and entry.offset % 64 == 0
            np.testing.assert_array_equal(arrays[name], exact[name], err_msg=name)
            continue
        assert entry.dtype == dtype and entry.offset % 4096 == 0
        shared = 2 if name.endswith("gate_up") else 1
        rows = spec.intermediate_size if shared == 2 else values.shape[0]
        bits = values.view(np.uint16) if dtype == "bfloat16" else values
        np.testing.assert_array_equal(unpack(arrays[name], rows, values.shape[1], shared), bits, err_msg=name)
        assert not arrays[name].flags.writeable
    last = entries[-1]
    assert last.offset < checkpoint.weight_bytes("panels") <= os.fstat(memfd).st_size
