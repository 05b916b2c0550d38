"""Compute shares: which partition a device gets, and what a share means on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from muxserve.engine.shares import GREEN_CONTEXTS_DRIVER, NoPartition, Partition, ThreadsPartition, detect


def test_a_share_is_the_nearest_number_of_threads_and_never_none() -> None:
    partition: Partition = ThreadsPartition(lambda n: None)
    assert [partition.threads(share, 8) for share in (1.0, 0.5, 0.3, 0.01)] == [8, 4, 2, 1]
    assert partition.threads(0.5, 1) == 1


@pytest.mark.parametrize(("share", "cores"), [(0.0, 4), (-0.5, 4), (1.01, 4), (float("nan"), 4), (0.5, 0)])
def test_a_share_outside_its_range_is_refused(share: float, cores: int) -> None:
    for partition in (ThreadsPartition(lambda n: None), NoPartition()):
        with pytest.raises(ValueError, match=r"share|cores"):
            partition.threads(share, cores)


def test_threads_are_set_only_when_they_change() -> None:
    calls: list[int] = []
    partition = ThreadsPartition(calls.append)
    for threads in (2, 2, 4, 4, 2):
        partition.apply(threads)
    assert calls == [2, 4, 2]


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
        "import sys, muxserve.engine.shares, muxserve.engine.arena_cuda, muxserve.engine.tables; "
        "print([m for m in ('torch', 'cupy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
