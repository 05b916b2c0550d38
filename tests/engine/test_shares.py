"""Compute shares: which partition a device gets, and what a share means on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxserve.engine.shares import GREEN_CONTEXTS_DRIVER, detect, split_cores


def test_a_lone_job_has_all_cores_and_two_have_them_by_their_shares() -> None:
    assert split_cores(8, 0.0, 0.0) == (0, 0)
    assert split_cores(8, 0.3, 0.0) == (8, 0)
    assert split_cores(8, 0.0, 0.3) == (0, 8)
    assert split_cores(8, 0.5, 0.5) == (4, 4)
    assert split_cores(8, 0.25, 0.75) == (2, 6)
    assert split_cores(2, 0.5, 1.0) == (1, 1)


@given(cores=st.integers(2, 256), prefill=st.floats(0.01, 1), decode=st.floats(0.01, 1))
def test_two_jobs_share_every_core_and_none_goes_without(cores: int, prefill: float, decode: float) -> None:
    threads = split_cores(cores, prefill, decode)
    assert min(threads) >= 1
    assert sum(threads) == cores


def test_one_core_is_one_thread_each() -> None:
    assert split_cores(1, 0.5, 0.5) == (1, 1)


def test_a_cpu_has_threads_and_a_gpu_says_what_is_there_but_not_used(tmp_path: Path) -> None:
    assert detect("cpu").partition == "threads"
    new = detect("cuda:1", GREEN_CONTEXTS_DRIVER, tmp_path)
    assert (new.partition, new.unused) == ("none", ("green_contexts",))
    assert "12.4" in new.reason
    (tmp_path / "control").touch()
    assert detect("cuda", 13000, tmp_path).unused == ("green_contexts", "mps")
    assert detect("cuda", 12030, tmp_path / "absent").unused == ()
    with pytest.raises(ValueError, match="device"):
        detect("tpu")


def test_the_worker_may_ask_without_torch() -> None:
    code = (
        "import sys, muxserve.engine.shares, muxserve.engine.cuda.arena, muxserve.engine.tables; "
        "print([m for m in ('torch', 'cupy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
