"""The GPU's benchmark on tiny shapes, interpreted: no fault of it waits for a GPU."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kernels, parity
from benchmarks.gpu.attention_cells import decode_cells, prefill_cells
from benchmarks.gpu.context import Context
from benchmarks.gpu.process import SectionProcess, measure, missing
from benchmarks.gpu.report import summary
from benchmarks.gpu.sections import BY_NAME, SECTIONS, Section
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.side import side_by_side

ROOT = Path(__file__).resolve().parents[3]
TINY = ("--device", "cpu", "--tiny")


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *TINY, "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(out: Path, *arguments: str) -> dict[str, Any]:
    """Its results; all that was asked for is in them, and in the summary."""
    process = start(out, *arguments)
    printed, told = process.communicate(timeout=450)
    assert process.returncode == 0, printed + told
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert printed.strip() == (out / "summary.txt").read_text().strip()
    assert "incomplete" not in printed
    return results


def found_of(results: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    assert list(results["sections"]) == list(names)
    for section in results["sections"].values():
        assert "error" not in section
        assert "skipped" not in section
    return [results["sections"][name]["found"] for name in names]


def test_sections_in_processes(tmp_path: Path) -> None:
    environment, ipc, attention = found_of(
        run(tmp_path, "--only", "ipc,attention"), "environment", "ipc", "attention"
    )
    assert environment["ceilings"]["copy_bytes_per_s"] > 0
    assert ipc["right"]
    assert ipc["unfreed_bytes"] == ipc["unfreed_after_death_bytes"] == 0
    assert {len(attention["decode"]), len(attention["prefill"])} == {1, 2}
    assert attention["decode"][0]["of_copy"] > 0


def test_sections_in_one_process(tmp_path: Path) -> None:
    names = ("environment", "models", "parity")
    _, models, same = found_of(run(tmp_path, "--inline", "--only", ",".join(names)), *names)
    (shape,) = models["shapes"].values()
    assert shape["decode"][0]["tokens_per_s"] > 0
    assert shape["eager"]["prefill"][0]["tokens_per_s"] > 0
    assert not same["failed"]
    assert same["cases"][0]["equal"] == same["cases"][0]["tokens"]


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_all_sections(tmp_path: Path) -> None:
    names = [section.name for section in SECTIONS]
    found = dict(zip(names, found_of(run(tmp_path, "--only", ",".join(names)), *names), strict=True))
    assert not found["kernels"]["failed"]
    assert not found["kernels"]["not_run"]
    assert found["memory"]["most_beyond_weights"] == 0
    assert {point["way"] for point in found["multiplexing"]["points"]} == {
        *("alone", "turns", "streams", "shares")
    }
    assert found["peer"]["workloads"][0]["ours_over_theirs"] > 0
    assert set(found["service"]["policies"]) == {"mux", "spatial"}
    for policy in found["service"]["policies"].values():
        assert policy["ended"] == found["service"]["requests"]
    assert len(found["tune"]["entries"]) == 2


def test_what_is_there_is_kept_when_the_run_is_cut_off(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "models")
    assert process.stderr is not None
    while "models: begins" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cut_off"]
    assert "ceilings" in results["sections"]["environment"]["found"]
    assert "CUT OFF" in printed
    assert "environment" in printed
    with pytest.raises(ProcessLookupError):  # none of it is left
        os.killpg(process.pid, 0)


def test_a_section_that_fails_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    context = Context("cpu", True, time.monotonic() + 1, part=tmp_path / "part")
    context.keep({"half": 1})
    result = measure(Section("no_such_section", 1), context)
    assert "ModuleNotFoundError" in result["error"]
    assert result["found"] == {"half": 1}
    text = summary({"device": "cpu", "tiny": False, "sections": {"models": result}})
    assert "FAILED" in text
    assert "?    MiB of a model more" in text


def test_what_other_processes_are_given_can_be_sent_there() -> None:
    context = Context("cuda", False, 0.0)
    cells = [cell for group in (*decode_cells(context), *prefill_cells(context)) for cell in group]
    for what in (kernels.cases(context), cells, parity.cases(context, parity.CPU_ENGINE)):
        assert pickle.loads(pickle.dumps(what)) == what


def test_processes_side_by_side_give_what_each_makes_of_its_item() -> None:
    context = Context("cuda", False, time.monotonic() + 60)
    found = dict(side_by_side(context, math.sqrt, [4.0, -1.0, 9.0]))
    assert (found[4.0], found[9.0]) == (2.0, 3.0)
    assert str(found[-1.0]).startswith("ValueError")


def test_shapes_have_as_many_parameters_as_their_names_say() -> None:
    billions = []
    for shape in SHAPES:
        heads = shape.head_parameters * (1 if shape.tied else 2)
        billions.append(round((shape.layer_parameters + heads) / 1e9, 2))
    assert billions == [8.03, 6.74, 4.02]


def test_a_section_whose_modules_are_missing_is_known_before_it_starts() -> None:
    section = Section("x", 1, ("json", "no_such_module", "no_such_parent.module"), ("nor_this",))
    assert missing(section, "cpu") == ["no_such_module", "no_such_parent.module"]
    assert missing(section, "cuda") == ["no_such_module", "no_such_parent.module", "nor_this"]


def test_a_section_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = SectionProcess(BY_NAME["environment"], "cpu", tmp_path, log)
        assert not process.wait(0.1)  # it waits to be begun
        process.begin(-1e6, {}, True)
        while not process.wait(0.1):
            pass
        assert "did not end in time" in process.result()["error"]
