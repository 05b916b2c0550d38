"""benchmarks/multiplex: what is made of measurements, and one short run of everything on a tiny model."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.multiplex.__main__ import SECTIONS, Benchmark
from benchmarks.multiplex.measuring import Cell
from benchmarks.multiplex.plan import CASES, FULL, QUICK
from benchmarks.multiplex.report import markdown
from benchmarks.multiplex.skew import Skew
from muxserve.bench.generator import Run
from muxserve.bench.latency import Slo, Unloaded
from muxserve.bench.outcomes import Outcome, Status
from muxserve.bench.report import report
from muxserve.bench.search import Goodput, Probe
from tests.engine.model_factory import make_model

ALONE = Unloaded(0.05, 0.0, 0.01)


def cell(system: str, token_rate: float, latencies: dict[str, float], load: float = 1.0) -> Cell:
    """Ten requests of each model, all of that latency."""
    outcomes = [
        Outcome(n / 10, n / 10, model, "", 0, 5, 11, 11, n / 10 + latency / 2, n / 10 + latency, Status.OK)
        for model, latency in latencies.items()
        for n in range(10)
    ]
    slo = Slo(8.0, dict.fromkeys(latencies, ALONE))
    return Cell(system, load, token_rate, report(Run(tuple(outcomes), 10, 0.1, False), 0, 1, slo), {})


def goodput(rate: float, below: float) -> Goodput:
    return Goodput(rate, below, (Probe(rate, 200, 0, True), Probe(below, 200, 9, False)))


def test_ratios_compare_ours_with_everybody() -> None:
    skew = Skew(1.3, "mux")
    skew.saturated = [
        cell(name, rate, {"a": 1}) for name, rate in (("mux", 600), ("fcfs", 500), ("vllm", 900))
    ]
    skew.goodputs = {
        "mux": goodput(6, 7),
        "fcfs": goodput(4, 5),
        "spatial": Goodput(0, 2.0, ()),
        "vllm": goodput(3, 4),
    }
    skew.cells = {0.8: [cell("mux", 480, {"a": 0.5, "b": 5.0})]}
    skew.unloaded = {name: {"ttft": ttft} for name, ttft in (("mux", 0.02), ("vllm", 0.05))}
    found = skew.ratios()
    assert found["goodput_vs_fcfs"] == 1.5
    assert found["goodput_vs_spatial"] == 3.0, "nothing passed: at least ours over the lowest that failed"
    assert found["goodput_vs_vllm"] == 2.0
    assert found["throughput_vs_best"] == 1.2, "of our policies"
    assert found["unloaded_ttft_vs_vllm"] == 2.5
    assert found["worst_model_attainment"] == 0.0, "b is late"
    assert json.loads(json.dumps(skew.as_json(), allow_nan=False))["ours"] == "mux"


def test_time_between_tokens_is_compared_where_the_other_copes() -> None:
    skew = Skew(1.3, "mux")
    skew.saturated = [cell("mux", 1, {"a": 1})]
    skew.goodputs = {name: goodput(1, 2) for name in ("mux", "spatial", "temporal")}
    skew.cells = {
        0.5: [cell("mux", 1, {"a": 0.6}), cell("spatial", 1, {"a": 0.5}), cell("temporal", 1, {"a": 9})]
    }
    found = skew.ratios()
    assert found["p99_tpot_over_spatial"] == 1.2
    assert "p99_tpot_over_temporal" not in found


def test_the_papers_cases_have_its_rates_and_lengths() -> None:
    case = CASES[0].mix(FULL)
    assert [stream.share for stream in case.streams] == [2, 8, 8]
    lengths = [stream.lengths.output for stream in case.streams]
    assert lengths[0] == pytest.approx(2 * lengths[1]) and lengths[1] == lengths[2]
    requests = QUICK.mix(2.1).poisson(100, 50, 0)
    counts = Counter(request.model for request in requests)
    assert counts["m0"] > 4 * counts["m1"] > 4 * counts["m3"]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_all_sections_run_and_can_be_rendered(tmp_path: Path) -> None:
    tiny = make_model("llama", tmp_path / "tiny", head_dim=64, heads=4, kv_heads=2)
    plan = replace(
        FULL,
        alphas=(1.3,),
        policies=("mux", "fcfs"),
        searched=("mux",),
        loads=(0.2, 0.5),
        scale=0.05,
        vocabulary=200,
        saturation=2.0,
        probe=2.0,
        cell=2.0,
        probes=2,
        repeats=1,
        overload=4.0,
        light=2.0,
        tenants=2.0,
        cases=2.0,
    )
    options = argparse.Namespace(model=tiny, quick=False, only=None, out=tmp_path / "out", peer_python="")
    benchmark = Benchmark(options, plan, tmp_path / "logs")
    await benchmark.run()
    assert {
        "throughput_vs_best",
        "worst_model_attainment",
        "tenant_p99_ttft_ratio",
    } <= benchmark.ratios.keys()
    assert {f"{section}.json" for section in SECTIONS} <= {path.name for path in options.out.iterdir()}
    assert {"goodput.png", "loads-1.3.png", "overload.png"} <= {path.name for path in options.out.iterdir()}
    tables = markdown(options.out)
    assert all(text in tables for text in ("saturated throughput", CASES[0].name, "Overload", "Tenants"))
