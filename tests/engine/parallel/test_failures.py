"""A rank that dies or hangs ends the others: soon, and saying why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.messages import DecodeRow, Step
from muxserve.engine.parallel.errors import MeshBroken
from muxserve.engine.parallel.group import join
from tests.engine.model_factory import make_model
from tests.engine.parallel.mesh import GREEDY, Mesh
from tests.engine.parallel.rank import BROKEN

AT_ONCE = 10.0
"""Seconds; what is compared with it takes milliseconds, on a machine that may be busy."""


def decoding(mesh: Mesh, path: Path) -> None:
    """Start a decode job that is far from its end."""
    make_model("llama", path, heads=mesh.ranks, kv_heads=mesh.ranks, layers=1)
    checkpoint = open_checkpoint(path, "float32")
    mesh.add("m", checkpoint, slots=1, context=4000)
    mesh.generate("m", [[5, 6, 7]], 1, chunk=3)
    mesh.start("m", [DecodeRow(0, 4, 4000, GREEDY)], 3990)
    assert isinstance(mesh.step(), Step)


def last_words(mesh: Mesh, rank: int) -> str:
    """The error that a rank reports before it ends."""
    while isinstance(report := mesh.step(rank), Step) or not report.error:
        pass
    assert mesh.processes[rank].wait(timeout=AT_ONCE) == BROKEN
    return report.error


def test_a_follower_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    with Mesh(3) as mesh:
        decoding(mesh, tmp_path)
        begun = time.monotonic()
        mesh.processes[2].kill()
        for rank in (0, 1):
            assert last_words(mesh, rank).startswith("MeshBroken: ")
        assert time.monotonic() - begun < AT_ONCE


def test_a_leader_that_is_killed_ends_the_others_even_while_nothing_runs() -> None:
    with Mesh(2) as mesh:
        begun = time.monotonic()
        mesh.processes[0].kill()
        assert last_words(mesh, 1).startswith("MeshBroken: following rank 0: ")
        assert time.monotonic() - begun < AT_ONCE


def test_a_rank_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with Mesh(2, timeout=5.0) as mesh:
        decoding(mesh, tmp_path)
        begun = time.monotonic()
        os.kill(mesh.processes[1].pid, signal.SIGSTOP)
        assert last_words(mesh, 0).startswith("MeshBroken: all-")
        assert 2.5 < time.monotonic() - begun < 5.0 + AT_ONCE
        os.kill(mesh.processes[1].pid, signal.SIGCONT)
        assert last_words(mesh, 1).startswith("MeshBroken: ")


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_the_timeout() -> None:
    meeting = os.memfd_create("meeting")
    try:
        begun = time.monotonic()
        with pytest.raises(MeshBroken, match="meeting the other ranks: "):
            join(0, 2, meeting, torch.device("cpu"), timeout=0.5)
        assert time.monotonic() - begun < AT_ONCE
    finally:
        os.close(meeting)
