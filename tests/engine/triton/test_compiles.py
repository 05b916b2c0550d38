"""Every kernel compiles to machine code for a Hopper GPU; what it needs of one is there. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_MEMORY, REGISTERS = 227 * 1024, 64 * 1024
"""Of a program, and of a multiprocessor."""
SPILLED = {"_angles": 32}
"""Bytes: sin and cos of arguments far above any position keep a few words in memory."""
NAMES = {"_count", "_penalise", "_weigh", "_choose", "_rms_norm", "_gate_mul", "_angles", "_advance"}


def figures(cache: Path, head_dims: list[int]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.triton.launches", *map(str, head_dims)],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "head_dims",
    [[128], pytest.param([64, 80, 96, 128, 256], marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def test_kernels_compile_without_spilling_and_within_a_multiprocessor(
    tmp_path: Path, head_dims: list[int]
) -> None:
    found = figures(tmp_path, head_dims)
    assert {one["kernel"] for one in found} == NAMES | {"_write", "_decode", "_merge", "_prefill"}
    for one in found:
        assert one["spilled"] <= SPILLED.get(one["kernel"], 0), one
        assert one["shared"] <= SHARED_MEMORY, one
        assert one["registers"] * one["warps"] * 32 <= REGISTERS, one
    # K and V come in ahead of use, 16 bytes at a time, and go through the tensor cores.
    for one in found:
        if one["kernel"] in ("_decode", "_prefill"):
            assert one["wide_copies"] > 0, one
            assert one["mma" if one["kernel"] == "_decode" else "wgmma"] > 0, one
