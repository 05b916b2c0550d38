"""Traces: read in the order of their times, refused by the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muxserve.sim.arrivals import TraceError, read_trace
from tests.sim.inputs import two_models

LINE: dict[str, Any] = {"time": 1.0, "model": "hot", "prompt": 3, "output": 4}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    return path


def test_requests_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", LINE | {"time": 2}, LINE)
    arrivals = read_trace(path, two_models())
    assert [a.time for a in arrivals] == [1.0, 2.0]
    assert (arrivals[0].prompt, arrivals[0].output) == (3, 4)


@pytest.mark.parametrize(
    "change",
    [{"model": "x"}, {"time": -1}, {"output": 0}, {"prompt": "long"}, {"prompt": 5000}, {"time": None}],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=r"t\.jsonl:2"):
        read_trace(write(tmp_path / "t.jsonl", LINE, LINE | change), two_models())
