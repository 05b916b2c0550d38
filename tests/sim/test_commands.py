"""`muxserve place`, `simulate` and `profile`, as users call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from muxserve.cli.main import app
from muxserve.placement.solver.cost import read_costs
from tests.e2e.conftest import running
from tests.engine.model_factory import make_model
from tests.placement.solver.inputs import table_document

RATES = {"a": ("llama-7b", 6.0), "b": ("llama-13b", 1.0), "c": ("llama-7b", 0.5)}


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """--workload and --cost."""
    workload, cost = tmp_path / "w.yaml", tmp_path / "c.json"
    models = [{"name": n, "model": kind, "rate": rate} for n, (kind, rate) in RATES.items()]
    workload.write_text(
        yaml.safe_dump(
            {
                "cluster": {"nnodes": 1, "ngpus_per_node": 2},
                "models": models,
                "avg_prompt_len": 100,
                "avg_output_len": 50,
            }
        )
    )
    cost.write_text(json.dumps(table_document()))
    return ["--workload", str(workload), "--cost", str(cost)]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def place(inputs: list[str], *further: str) -> dict[str, Any]:
    result = call("place", *inputs, "--format", "json", *further)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("algorithm", ["paper", "greedy", "spatial"])
def test_a_placement_is_printed_as_json(inputs: list[str], algorithm: str) -> None:
    placement = place(inputs, "--algorithm", algorithm)
    assert set(placement) == {"units", "estimate"}
    for unit in placement["units"]:
        assert set(unit) == {"gpus", "models"}
        assert all(len(gpu) == 2 for gpu in unit["gpus"])
        for model in unit["models"]:
            assert set(model) == {"name", "model", "tensor_parallel", "prefill_share", "decode_share"}
            assert model["model"] == RATES[model["name"]][0]
    assert placement["estimate"]["gpus_used"] == sum(len(unit["gpus"]) for unit in placement["units"])
    assert placement["estimate"]["algorithm"] == algorithm
    assert 0 < placement["estimate"]["equation_3"] <= 7.5


def test_best_is_simulated_in_processes_of_its_own_and_ends_in_time(inputs: list[str]) -> None:
    placement = place(inputs, "--algorithm", "best", "--time-limit", "20")
    assert placement["estimate"]["seconds"] < 25
    assert placement["estimate"]["throughput"] == pytest.approx(7.5)
    assert placement["estimate"]["unplaced"] == []


def test_a_table_and_a_picture_are_made(inputs: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    result = call("place", *inputs, "--algorithm", "spatial", "--plot", str(picture))
    assert result.exit_code == 0
    assert "llama-13b" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "mux"])
def test_a_placement_is_simulated(inputs: list[str], tmp_path: Path, policy: str) -> None:
    placement, picture = tmp_path / "p.json", tmp_path / "s.png"
    placement.write_text(json.dumps(place(inputs, "--algorithm", "paper")))
    further = ["--placement", str(placement), "--policy", policy, "--duration", "20", "--seed", "3"]
    result = call("simulate", *inputs, *further, "--format", "json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["policy"], report["duration"], report["seed"]) == (policy, 20, 3)
    assert report["total"]["requests"] > 50
    assert set(report["models"]) == set(RATES)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("simulate", *inputs, *further, "--format", "json").stdout == result.stdout
    table = call("simulate", *inputs, *further)
    assert "worst model" in table.stdout


def test_a_trace_is_simulated(inputs: list[str], tmp_path: Path) -> None:
    placement, trace = tmp_path / "p.json", tmp_path / "t.jsonl"
    placement.write_text(json.dumps(place(inputs, "--algorithm", "spatial")))
    lines = [{"time": 5 + i, "model": "a", "prompt": 10, "output": 5} for i in range(10)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    further = ["--placement", str(placement), "--trace", str(trace), "--duration", "20", "--format", "json"]
    report = json.loads(call("simulate", *inputs, *further).stdout)
    assert report["total"]["requests"] == 10
    assert report["models"]["a"]["attainment"]["1"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": []}, ""),
        ({"units": [{"gpus": [[0, 9]], "models": []}]}, "there is no GPU 9 on node 0"),
        ({"unit": []}, "'units' is missing"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(
    inputs: list[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    placement = tmp_path / "p.json"
    placement.write_text(json.dumps(change))
    result = call("simulate", *inputs, "--placement", str(placement), "--duration", "5")
    assert result.exit_code == (2 if message else 0)
    assert message in result.output


def test_what_cannot_be_read_is_told_in_a_line(inputs: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("[")
    for option in (0, 2):
        arguments = [*inputs]
        arguments[option + 1] = str(wrong)
        result = call("place", *arguments)
        assert result.exit_code == 2
        assert result.output.startswith(f"error: {wrong}")
    result = call("simulate", *inputs, "--placement", str(wrong), "--policy", "none")
    assert result.exit_code == 2
    assert 'no policy named "none"' in result.output
    assert call("simulate", *inputs, "--placement", str(tmp_path / "absent")).exit_code == 2


@pytest.mark.parametrize("name", ["p.txt", "absent/p.png"])
def test_a_picture_that_cannot_be_written_is_refused_at_once(
    inputs: list[str], tmp_path: Path, name: str
) -> None:
    result = call("place", *inputs, "--plot", str(tmp_path / name))
    assert result.exit_code == 2
    assert result.output.startswith("error: --plot: ")


def test_a_deployment_is_profiled(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    table = tmp_path / "table.json"
    with running(tmp_path, "--model", f"tiny={model}", "--cores", "1", "--arena", "64MiB") as cluster:
        done = cluster.cli(
            *("profile", "--output", str(table), "--repeat", "1"),
            *("--batch", "1", "--batch", "2", "--length", "16", "--length", "64"),
            *("--admin", cluster.admin),
        )
    assert done.returncode == 0, done.stderr
    costs = read_costs(table)
    assert costs.models == ["tiny"]
    assert costs.prefill("tiny", 1, 1.0, 2, 64) > 0
    assert costs.decode("tiny", 1, 1.0, 2, 64) > 0
    assert costs.shares("tiny", 1) == [0.5, 1.0]
    assert costs.decode("tiny", 1, 0.5, 2, 64) >= costs.decode("tiny", 1, 1.0, 2, 64)
    assert (costs.service.compute_units, costs.service.slots) == (1, 64)
    assert 0 < costs.service.request_seconds < 1
