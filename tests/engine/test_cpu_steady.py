"""Requests without end over a pool that is nine tenths full: nothing leaks, nothing slows down, and a request
gets the same text whatever batch it is in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.cohort import Options
from benchmarks.engine.steady import run
from tests.engine.cuda.processes import start
from tests.engine.model_factory import make_model

RUN = """
import json, sys
from pathlib import Path
from benchmarks.engine.cohort import Options
from benchmarks.engine.steady import run
options = Options(Path(sys.argv[1]), requests=300, longest_prompt=100, longest_text=40, block_bytes=4096)
print(json.dumps(run(options), default=str))
"""
"""In a process of its own: threads and descriptors of others are none of the engine's."""


def assert_steady(found: dict[str, Any]) -> None:
    """`run` itself has checked the texts, and that all blocks and slots came back."""
    assert 0.85 < found["pool"]["used_median"] < 0.95
    assert found["requests"]["recomputed"] <= found["requests"]["all"] // 20
    for what in ("descriptors", "threads"):
        assert found[what]["end"] == found[what]["begin"]
    resident = found["resident_bytes"]
    assert resident["end"] - resident["begin"] < 8 * 2**20


def test_nothing_leaks(tmp_path: Path) -> None:
    process = start(RUN, str(make_model("llama", tmp_path, layers=2)), stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert_steady(json.loads(out.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_last_hundred_requests_are_as_fast_as_the_first() -> None:
    """By processor time: what else runs on these cores is not the engine's doing."""
    found = run(Options(requests=300))
    assert_steady(found)
    assert found["last_over_first"]["cpu"]["median"] < 1.05
